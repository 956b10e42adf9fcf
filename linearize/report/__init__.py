"""The report as a page and pictures: `write_page(paths, "report.html")` in `linearize.report.page`.

`sources` reads what commands left, `conversion_views` makes views of it, `figures` draws a view, `html` writes the
page; what a view is says `linearize.evals.views`.
"""
