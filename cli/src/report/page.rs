//! The document of a run as one HTML text that needs nothing else: style, script and data stand in it.
//!
//! `page/page.html` is the frame, `page/*.js` draw (see `page/main.js`), `page/uplot` is the one library, with its licence. Text of models
//! and users stands in the page as JSON alone, from which the scripts put it in as text, never as HTML.

use serde_json::Value;

use super::fit::fit;

/// More than a page ever has, in bytes: mail and browsers take it.
pub const MOST_BYTES: usize = 3_000_000;

const FRAME: &str = include_str!("page/page.html");
const LICENCE: &str = include_str!("page/uplot/LICENSE");
const STYLES: [&str; 2] = [include_str!("page/uplot/uPlot.min.css"), include_str!("page/page.css")];
/// In one function, so that nothing of them is global.
const SCRIPTS: [&str; 10] = [
    include_str!("page/uplot/uPlot.iife.min.js"),
    include_str!("page/base.js"),
    include_str!("page/plots.js"),
    include_str!("page/grid.js"),
    include_str!("page/routers.js"),
    include_str!("page/experts.js"),
    include_str!("page/words.js"),
    include_str!("page/caches.js"),
    include_str!("page/table.js"),
    include_str!("page/main.js"),
];

/// The page of a document, which is shortened where the page would be too long: it says so then.
pub fn page(document: &Value) -> String {
    let style = STYLES.join("\n");
    let script = format!("(() => {{\n\"use strict\";\n/*!\n{LICENCE}*/\n{}\n}})();", SCRIPTS.join("\n"));
    let room = MOST_BYTES - FRAME.len() - style.len() - script.len() - MOST_TITLE;
    let data = fit(document, room);
    let pieces = [("{{title}}", title(document)), ("{{style}}", style), ("{{data}}", data), ("{{script}}", script)];
    let mut page = String::with_capacity(MOST_BYTES);
    // Front to back, so that nothing that is put in is looked at again.
    let mut rest = FRAME;
    for (mark, piece) in &pieces {
        let (before, after) = rest.split_once(mark).unwrap_or((rest, ""));
        page.extend([before, piece]);
        rest = after;
    }
    page + rest
}

/// JSON that can stand in a script: nothing in it ends the script or begins a comment.
pub fn in_script(document: &Value) -> String {
    document.to_string().replace('<', "\\u003c")
}

/// Room for a title, in bytes.
const MOST_TITLE: usize = 1000;

fn title(document: &Value) -> String {
    let command = document["command"].as_str().unwrap_or_default();
    let words = match document["model"]["name"].as_str() {
        Some(model) => format!("phase-moe {command} · {model}"),
        None => format!("phase-moe {command}"),
    };
    // A hundred characters, each of at most five bytes when escaped.
    let escaped = |character| match character {
        '&' => "&amp;".into(),
        '<' => "&lt;".into(),
        '>' => "&gt;".into(),
        other => String::from(other),
    };
    words.chars().take(100).map(escaped).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The JSON between the page's tags.
    fn embedded(page: &str) -> &str {
        let (_, after) = page.split_once(r#"<script type="application/json" id="document">"#).unwrap();
        after.split_once("</script>").unwrap().0
    }

    #[test]
    fn text_cannot_leave_its_place() {
        let evil = "</script><img src=x onerror=alert(1)><!--<script>\u{2028}\u{2029}{{script}}{{data}}&amp;\0";
        let document = json!({
            "command": "compare", "model": {"name": evil}, "result": {"rows": []}, "notes": [evil],
            "text": {"tokens": [evil, "<"], "sequences": [0], "kinds": [evil], "total": 2},
        });
        let page = page(&document);
        assert_eq!(serde_json::from_str::<Value>(embedded(&page)).unwrap(), document);
        assert!(!embedded(&page).contains('<'));
        assert!(!page.contains("<img") && !page.contains("<!--"), "text is HTML");
        assert_eq!(page.matches("</script>").count(), 2, "the document's script and the page's");
        assert!(page.contains("<title>phase-moe compare · &lt;/script&gt;&lt;img"));
    }

    #[test]
    fn a_page_is_whole_and_loads_nothing() {
        let page = page(&json!({"command": "tune", "model": null, "result": {}}));
        assert!(page.starts_with("<!doctype html>") && page.trim_end().ends_with("</html>"));
        assert!(!page.contains("{{"), "a mark is left");
        assert!(page.contains("<title>phase-moe tune</title>") && page.contains("Leon Sorokin"));
        for outside in ["src=", "href=\"http", "href=\"//", "url(", "@import", "fetch(", "XMLHttpRequest", "innerHTML"]
        {
            assert!(!page.contains(outside), "{outside}");
        }
        // The licence and a comment name an address, and SVG is named by one; nothing else is.
        let named = ["https://github.com/leeoniya/uPlot", "http://www.w3.org/2000/svg"];
        assert_eq!(page.matches("://").count(), named.iter().map(|name| page.matches(name).count()).sum::<usize>());
        assert!(page.contains("default-src 'none'"));
    }
}
