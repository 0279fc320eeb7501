"""`t2i-align demo`: compare models, vote, train on the votes and read the result, in a browser.

`app` has the command and the pages; all the rest is plain Python without Gradio: `media`, `pairs` and `votes` on disk,
`studio` draws, `training` runs, `report` counts.
"""
