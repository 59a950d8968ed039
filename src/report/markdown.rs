//! `report.md`: the tables of a report as Markdown.

use super::Report;
use crate::eval::{SettingResult, TOO_FEW, figure_rows, identification_table};

pub(super) fn markdown(report: &Report) -> String {
    let mut text = format!("# {}\n", escape(&report.title));
    let confidence = 100.0 * report.confidence;
    for model in report.models() {
        text += &format!("\n## {}\n", escape(model));
        let measured: Vec<_> = report.of(model).collect();
        if !measured.is_empty() {
            let head: Vec<String> = measured.iter().map(|m| escape(&m.setting)).collect();
            text += &format!("\n| | {} |\n|---|{}\n", head.join(" | "), "---:|".repeat(head.len()));
            let results: Vec<&SettingResult> = measured.iter().map(|m| &m.result).collect();
            for (name, cells) in figure_rows(&results) {
                text += &format!(
                    "| {name} | {} |\n",
                    cells.iter().map(|cell| escape(cell)).collect::<Vec<_>>().join(" | ")
                );
            }
            let num = |f: fn(&SettingResult) -> usize| {
                results.iter().map(|r| f(r).to_string()).collect::<Vec<_>>().join(" | ")
            };
            text += &format!("| genuine pairs | {} |\n", num(|r| r.metrics.num_genuine));
            text += &format!("| impostor pairs | {} |\n", num(|r| r.metrics.num_impostor));
            if has_mark(&results) {
                text += &format!("\n{}.\n", escape(TOO_FEW));
            }
            if let Some(drawn) = results.iter().find_map(|r| r.bootstrap.as_ref()) {
                text += &format!("\nIn brackets: {confidence} % intervals from {drawn}.\n");
            }
        }
        let galleries: Vec<_> = report.searched.iter().filter(|s| s.model == model).collect();
        if !galleries.is_empty() {
            let galleries: Vec<_> = galleries.iter().map(|s| (s.gallery.as_str(), &s.result)).collect();
            text += &format!("\n```text\n{}\n```\n", identification_table(&galleries));
        }
    }
    text += "\n## How this was measured\n\n| | |\n|---|---|\n";
    for (name, what) in &report.provenance {
        text += &format!("| {} | {} |\n", escape(name), escape(what));
    }
    text
}

/// Whether any metric has the mark `*` that [`TOO_FEW`] explains.
pub(super) fn has_mark(results: &[&SettingResult]) -> bool {
    figure_rows(results).iter().any(|(_, cells)| cells.iter().any(|cell| cell.contains('*')))
}

/// Escapes characters with a meaning in Markdown tables or HTML.
fn escape(text: &str) -> String {
    text.replace('\\', "\\\\").replace('|', "\\|").replace('*', "\\*").replace('<', "&lt;").replace('\n', " ")
}
