"""Sphinx's configuration for the report; `build_site.py` writes the pages that it applies to."""

project = html_title = "Distributed training with Ray"
extensions = ["myst_nb"]
highlight_language = "none"  # a code block that names no language is a command line, not Python
myst_heading_anchors = 4

nb_execution_mode = "off"
nb_merge_streams = True
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
nb_render_image_options = {"alt": "A plot drawn by the cell above; the text around it describes it."}
# Widgets would load their code from the network; their text stays.
nb_ipywidgets_js = {}
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]

html_theme = "furo"  # its fonts and icons are the system's and inline, so pages work from the disk
html_theme_options = {
    "top_of_page_buttons": [],
    "light_css_variables": {"color-brand-primary": "#2a6fdb", "color-brand-content": "#2a6fdb"},
    "dark_css_variables": {"color-brand-primary": "#7aa7f0", "color-brand-content": "#7aa7f0"},
}
html_static_path = html_css_files = ["site.css"]
html_copy_source = False
html_show_search_summary = False  # a page opened from the disk may not fetch the text for it
html_use_index = False
html_show_copyright = False
html_show_sphinx = False
