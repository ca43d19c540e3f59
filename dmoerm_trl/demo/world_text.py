"""The words of the simulated world: topics, prompt templates, and the clauses in which a capability point shows."""

TOPICS = (
    "tea rain music football cooking trains gardens dogs cats ships bread coffee winter summer chess films books school "
    "money travel mountains rivers birds horses robots planets dreams friendship families health sleep jobs art dance "
    "history science cities forests islands computers"
).split()
"""Shared by all the tasks, so that no topic tells the task."""

OPENINGS = (
    "",
    "",
    "Hello. ",
    "Good day. ",
    "On {topic} again. ",
    "Once more {topic}. ",
    "The {topic} matter. ",
    "About {topic}. ",
)
"""Before a prompt, whatever its task."""

CLOSINGS = (
    "",
    "",
    " Thanks.",
    " No hurry.",
    " So, {topic} please.",
    " It is {topic} again.",
    " All {topic}.",
    " I said {topic}.",
)
"""After a prompt, whatever its task."""

SMALL_TALK = (
    ("Hello again, it is about {topic}.", "Hello, {topic} then."),
    ("Are you there for {topic}?", "Yes, for {topic}."),
    ("May I say something about {topic}?", "Of course, if {topic} it is."),
    ("I thought about {topic} this morning.", "Oh, about {topic}?"),
    ("Can I come to {topic} now?", "Sure, to {topic} then."),
)
"""An earlier exchange of a user and an assistant, whatever the task."""

TEMPLATES = {
    "text_creation": (
        "Write a short poem about {topic} for my wall.",
        "Write a small story in which {topic} saves the day.",
        "Draft an advertisement that sells {topic} to young buyers.",
        "Compose a song of two verses around {topic}.",
        "Write an opening paragraph for a novel about {topic}.",
        "Draft a cheerful letter to the editor on {topic}.",
        "Invent a fairy tale with {topic} at its centre.",
        "Write a slogan and a caption for a poster of {topic}.",
        "Compose a speech that celebrates {topic} at a party.",
        "Write a product description with {topic} as its theme.",
        "Draft a blog entry describing a day full of {topic}.",
        "Create a rhyme for children about {topic}.",
        "Write a scene for the stage that begins with {topic}.",
    ),
    "roleplay": (
        "Pretend you are my old captain who adores {topic}.",
        "You are a wizard, and I am your pupil of {topic}.",
        "Act as my grandmother and talk to me of {topic}.",
        "Play the part of a detective obsessed with {topic}.",
        "Stay in character as a pirate who fears {topic}.",
        "Let us play: you are the queen, I bring {topic}.",
        "Be my shy neighbour who secretly loves {topic}.",
        "Imagine you are a knight sworn to protect {topic}.",
        "Speak as my wise teacher while we discuss {topic}.",
        "You play the grumpy landlord, I come about {topic}.",
        "Take the role of a ghost who misses {topic}.",
        "From now on you are my rival in {topic}.",
        "Answer as my best mate from camp, mad about {topic}.",
    ),
    "objective_qa": (
        "What is the exact origin of {topic}?",
        "When did people first record {topic}, and where?",
        "Explain how {topic} works according to experts.",
        "Which country is most known for {topic}?",
        "How many kinds of {topic} are there in total?",
        "What causes the main changes in {topic}?",
        "Give the definition of {topic} with a source.",
        "What facts are established about {topic}?",
        "Who discovered the earliest evidence of {topic}?",
        "Is it true that {topic} is older than writing?",
        "What does research say about the effects of {topic}?",
        "Name the main components behind {topic}.",
        "Why does {topic} differ between the north and the south?",
    ),
    "subjective_qa": (
        "Do you believe {topic} makes people happier?",
        "Should the state spend more on {topic}?",
        "In your opinion, is {topic} overrated?",
        "What is your view of {topic} in modern society?",
        "Is {topic} better than its alternatives, and why so?",
        "How ought we to judge the value of {topic}?",
        "Would you agree that {topic} deserves more respect?",
        "What do you think matters most in {topic}?",
        "Is it fair to criticise {topic} so harshly?",
        "Argue whether {topic} should be taught to everyone.",
        "Do the benefits of {topic} outweigh its costs?",
        "Which side would you take in the debate on {topic}?",
        "Could a good life do without {topic}, in your judgement?",
    ),
    "chitchat": (
        "I just got home and feel like {topic} tonight.",
        "Guess what, my sister gave me {topic} today!",
        "Ugh, I am tired, and {topic} was a mess.",
        "My weekend was all {topic}, how was yours?",
        "I am bored, shall we chat about {topic}?",
        "Nothing new here, only {topic} as usual.",
        "Honestly, {topic} made me smile this afternoon.",
        "I am a bit lonely, even {topic} did not help.",
        "Hey, how are you? I am busy with {topic}.",
        "You will not believe what happened with {topic}!",
        "I miss the days when we had {topic}.",
        "My friend and I quarrelled over {topic} yesterday.",
        "Finally Friday, time for some {topic}, right?",
    ),
    "others": (
        "Solve for x when {topic} costs 3x + 4 = 19.",
        "Compute 17 times 23 for a worksheet on {topic}.",
        "What is the derivative of x squared, with {topic} as example?",
        "A shop halves 48 units of {topic}; how many remain?",
        "Simplify the fraction 36 / 60 in a puzzle on {topic}.",
        "Fix this Python loop: for t in {topic}: print(t)",
        "Write a SQL query that counts rows of {topic}.",
        "Write a function that sorts a list of {topic}.",
        "Debug this code: def f(x): return {topic}[x",
        "Translate into French: we like {topic} very much.",
        "Translate the German word for {topic} into English.",
        "Put this sentence on {topic} into Spanish.",
        "Convert a JSON file on {topic} to CSV.",
    ),
}
"""At least twelve a task. The wording tells the task; `{topic}` does not."""

FILLERS = (
    "by the way",
    "so to speak",
    "as it were",
    "in a sense",
    "more or less",
    "for the moment",
    "at any rate",
    "in the meantime",
    "on the whole",
    "now and then",
    "after all",
    "these days",
    "for now",
    "in passing",
    "well then",
    "as usual",
)
"""Clauses that mean nothing: they vary a response's length."""

TOPICAL = {
    "intent conformity": (
        "here is {topic}",
        "your {topic} order",
        "the {topic} piece",
        "as wished {topic}",
    ),
    "question specific": (
        "on {topic} itself",
        "about {topic} exactly",
        "back to {topic}",
        "as to {topic}",
    ),
}
"""Point -> clauses that are a sign with the topic of the prompt, a lapse with any other topic."""

CLAUSES = {
    "expressiveness": (
        ("colours burst open", "stuff happened there"),
        ("whispers fill air", "it was something"),
        ("silver mist rises", "some items exist"),
        ("wild petals whirl", "there are parts"),
    ),
    "readability": (
        ("easy to follow", "which that whose"),
        ("step by step", "hereinafter the former"),
        ("plain words suffice", "vis a vis"),
        ("neat and tidy", "run on running"),
    ),
    "content richness": (
        ("many details follow", "nothing to add"),
        ("numbers are given", "that is all"),
        ("names and dates", "a few words"),
        ("a second scene", "same as ever"),
    ),
    "logic": (
        ("therefore it holds", "yet it hovers"),
        ("because of this", "despite no reason"),
        ("it follows that", "it breaks off"),
        ("if so then", "both yes no"),
    ),
    "personality and emotional investment": (
        ("my blood boils", "file was opened"),
        ("by my beard", "task in progress"),
        ("tears choke me", "no emotion found"),
        ("I tremble now", "this unit replies"),
    ),
    "conversational sense": (
        ("oh I see", "see section four"),
        ("tell me more", "end of statement"),
        ("what about you", "the reader notes"),
        ("right you are", "attached is form"),
    ),
    "empathy ability": (
        ("that sounds hard", "others have worse"),
        ("I feel you", "get over it"),
        ("you are understood", "stop your whining"),
        ("no wonder really", "not my problem"),
    ),
    "manifestation of relationship traits": (
        ("my dear companion", "to whom concerned"),
        ("as we promised", "we never met"),
        ("our old secret", "dear sir madam"),
        ("like that night", "whoever you be"),
    ),
    "personalized characteristic expression": (
        ("arr me hearties", "it is said"),
        ("quoth the raven", "one may speak"),
        ("elementary dear fellow", "typically they do"),
        ("bless your socks", "a standard phrase"),
    ),
    "correctness": (
        ("fire is hot", "fire is cold"),
        ("ice is cold", "ice is hot"),
        ("snow is white", "snow is black"),
        ("coal is black", "coal is white"),
    ),
    "objectiveness": (
        ("data show this", "I hate it"),
        ("measured in trials", "everybody loves them"),
        ("sources agree here", "idiots deny it"),
        ("surveys report so", "clearly the best"),
    ),
    "reasoning ability": (
        ("suppose the contrary", "luck decides that"),
        ("compare both rates", "guess any number"),
        ("rule out one", "flip a coin"),
        ("infer the cause", "magic does this"),
    ),
    "depth of knowledge": (
        ("at molecular scale", "look it up"),
        ("second order effects", "whatever it does"),
        ("named in theory", "dunno the term"),
        ("the original theorem", "a rule somewhere"),
    ),
    "convincing ability": (
        ("here is proof", "maybe maybe not"),
        ("the case stands", "I forgot why"),
        ("experience backs me", "believe or leave"),
        ("no doubt remains", "not sure myself"),
    ),
    "viewpoint richness": (
        ("on one hand", "my way only"),
        ("critics would object", "nobody else counts"),
        ("a third stance", "single track thinking"),
        ("others may differ", "just one answer"),
    ),
    "breadth of knowledge": (
        ("in ancient Rome", "only around here"),
        ("biology tells us", "never read any"),
        ("law also speaks", "outside my street"),
        ("in distant Japan", "within this room"),
    ),
    "proactivity": (
        ("let me suggest", "ask somebody else"),
        ("how about tomorrow", "up to you"),
        ("let us try", "do not bother"),
        ("next we plan", "I have nothing"),
    ),
    "emotion expression": (
        ("I am thrilled", "I register that"),
        ("so happy now", "noted for later"),
        ("it makes laugh", "it is logged"),
        ("hooray for that", "acknowledged as such"),
    ),
}
"""Point -> pairs of a sign and an equally long lapse."""
