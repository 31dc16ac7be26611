"""A page that shows a running server to a browser: read-only, self-contained, served by the server's own process.

look.py       one look at the run, taken on the event loop that owns it
history.py    what was seen, as far back as the page shows it
http.py       an HTTP server for a few read-only pages, with limits
app.py        the three together: one look a second, and who may see it
page.html, page.js, page.css    what the browser gets
"""
