"""
Convert public preference sets to preference rows; see recipes/PREPARE.md.

```
sets.py            the table of the sets: name -> columns and converter
pairwise.py        converters of pairs
scored.py          converters of responses with scores or ratings
prompts.py         formats of prompts
scores.py          scores -> ranks
reading.py         opening a set and reading its examples
preparation.py     examples -> checked rows, or counted errors
personal_data.py   detection of personal data
audit.py           statistics of the rows, and prompts that are in two parts
```
"""
