"""What the published suites share: finding and reading their files (`data`), prompts and checks (`base`), and scorers.

`choices` reads a letter, `vqa` compares short answers, `subtitles` reads the two formats of subtitles in use.
"""
