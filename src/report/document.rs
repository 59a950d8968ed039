//! Shared parts of the pages. Each page is one self-contained document without scripts.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use maud::{DOCTYPE, Markup, PreEscaped, html};

const STYLE: &str = include_str!("page.css");

/// Returns a page, from the kind of report, its title, a leading sentence and its sections.
pub(super) fn document(kind: &str, title: &str, lead: &Markup, body: &Markup) -> String {
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { (kind) ": " (title) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                header {
                    h1 { (title) }
                    p { (lead) }
                }
                main { (body) }
                footer {
                    p { "Face images are personal data: keep this page only where the images may be kept. Error rates hold only for people and photos like those of the test set." }
                }
            }
        }
    };
    page.into_string()
}

/// Section with everything needed to reproduce the results, as (name, value) rows.
pub(super) fn provenance(heading: &str, rows: &[(String, String)]) -> Markup {
    html! {
        section {
            h2 { (heading) }
            div.scroll {
                table.provenance {
                    tbody { @for (name, what) in rows { tr { th { (name) } td { (what) } } } }
                }
            }
        }
    }
}

/// Returns an image file as a `data:` URL.
pub(super) fn address(media_type: &str, bytes: &[u8]) -> String {
    format!("data:{media_type};base64,{}", STANDARD.encode(bytes))
}

/// Returns the last 28 characters of a name, so that it fits into a legend.
pub(super) fn short(name: &str) -> &str {
    let start = name.char_indices().rev().nth(27).map_or(0, |(at, _)| at);
    &name[start..]
}
