"""The page of `mmtok demo --page`: a picture, a question and a budget, what it keeps, and what the model answers.

1. `command` starts the server, or takes a running one, and serves the page.
2. `app` is what the browser asks; `guard` refuses what another site's page has it ask.
3. `pictures` holds the pictures, `patches` what each method keeps of them, `served` the server and its state.
4. `static` is the page itself, as the browser reads it: `page.js` holds the state and what changes it, `view.js` makes
   the document of a state by lit-html (`vendor`), `draw.js` the pictures; `selection.js` and `answers.js` are what both
   know of a selection and of the server's answers.
"""
