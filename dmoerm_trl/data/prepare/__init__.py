"""
Public preference sets, by name, as preference rows; see recipes/PREPARE.md.

```
sets.py            the table of the sets: name -> columns and converter
pairwise.py        converters of pairs
scored.py          converters of responses with scores or ratings
prompts.py         the ways in which sets write a prompt
scores.py          scores -> ranks
reading.py         opening a set and reading its examples
preparation.py     examples -> checked rows, or counted reasons
personal_data.py   what looks like personal data
audit.py           what is in the rows, and which prompts stand in two parts
```
"""
