//! What the pages have in common: one document each, without scripts and without anything to load.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use maud::{DOCTYPE, Markup, PreEscaped, html};

const STYLE: &str = include_str!("page.css");

/// A page: what kind of report it is and of what, a sentence on it, and its sections.
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
                    p { "Face images are personal data: keep this page where the images may be. Error rates hold for people and photos like those of the test set." }
                }
            }
        }
    };
    page.into_string()
}

/// The section that says what is needed to repeat it.
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

/// The file of an image, as an address.
pub(super) fn address(media_type: &str, bytes: &[u8]) -> String {
    format!("data:{media_type};base64,{}", STANDARD.encode(bytes))
}

/// The end of a long name: a legend is small.
pub(super) fn short(name: &str) -> &str {
    let start = name.char_indices().rev().nth(27).map_or(0, |(at, _)| at);
    &name[start..]
}
