"""The page of `mmtok demo --page`: a picture, a question and a budget, the kept patches, and the model's answers.

1. `command` starts the server, or connects to a running one, and serves the page.
2. `app` answers the browser's requests; `guard` refuses requests that another site's page makes.
3. `pictures` holds the pictures, `patches` computes what each method keeps of them, `served` knows the server's state.
4. `static` is the page itself: `page.js` holds the state and changes it, `view.js` renders a state by lit-html
   (`vendor`), `draw.js` draws the pictures; `selection.js` and `answers.js` are shared by both.
"""
