"""The report as a page and pictures: `write_page(paths, "report.html")` in `linearize.report.page`.

`sources` reads what commands left, `conversion_views` makes views of it, which `linearize.evals.views` defines, `figures`
draws a view, `html` writes the page.
"""
