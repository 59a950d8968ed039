//! `report.html` of an evaluation.

use maud::{Markup, PreEscaped, html};

use super::document::{document, provenance, short};
use super::faces::FacePair;
use super::markdown::has_mark;
use super::{Measured, Report, plot};
use crate::error::Result;
use crate::eval::{AtFmr, SettingResult, TOO_FEW, figure_rows};

pub(super) fn page(report: &Report) -> Result<String> {
    let models = report.models();
    let mut sections = Vec::new();
    for model in &models {
        sections.push(section(report, model)?);
    }
    let lead = html! {
        "Face verification as measured by " code { "maskinv evaluate" } ". Scores are cosines; a pair is accepted if its score is at least the threshold."
    };
    let body = html! {
        @if models.len() > 1 { (side_by_side(report, &models)?) }
        @for section in &sections { (section) }
        (provenance("How this was measured", &report.provenance))
    };
    Ok(document("Evaluation", &report.title, &lead, &body))
}

/// Section that compares the models: a table of EERs and a DET plot for each setting.
fn side_by_side(report: &Report, models: &[&str]) -> Result<Markup> {
    let mut settings: Vec<&str> = Vec::new();
    for measured in &report.measured {
        if !settings.contains(&measured.setting.as_str()) {
            settings.push(&measured.setting);
        }
    }
    let mut plots = Vec::new();
    for setting in &settings {
        let lines: Vec<plot::Line> = report
            .measured
            .iter()
            .filter(|m| m.setting == *setting)
            .map(|m| (short(&m.model), m.curve.as_slice()))
            .collect();
        plots.push(plot::det(&format!("{setting}: DET"), &lines)?);
    }
    Ok(html! {
        section {
            h2 { "Models side by side" }
            div.scroll {
                table {
                    thead { tr { th { "EER %" } @for setting in &settings { th { (setting) } } } }
                    tbody {
                        @for model in models {
                            tr {
                                th { (model) }
                                @for setting in &settings {
                                    td { (report.of(model).find(|m| m.setting == *setting).map_or("-".to_owned(), eer)) }
                                }
                            }
                        }
                    }
                }
            }
            div.plots { @for plot in &plots { figure { (PreEscaped(plot)) } } }
        }
    })
}

/// Formatted EER, which is the first row of the table of metrics.
fn eer(measured: &Measured) -> String {
    figure_rows(&[&measured.result])[0].1[0].clone()
}

/// Section with all results of one model.
fn section(report: &Report, model: &str) -> Result<Markup> {
    let measured: Vec<&Measured> = report.of(model).collect();
    let lines: Vec<plot::Line> = measured.iter().map(|m| (m.setting.as_str(), m.curve.as_slice())).collect();
    let mut plots = Vec::new();
    if !measured.is_empty() {
        plots.extend([plot::det("DET", &lines)?, plot::roc("ROC", &lines)?]);
    }
    for m in &measured {
        plots.push(plot::histogram(&format!("{}: scores", m.setting), &m.histogram)?);
    }
    let results: Vec<&SettingResult> = measured.iter().map(|m| &m.result).collect();
    let drawn = results.iter().find_map(|r| r.bootstrap.as_ref());
    let confidence = 100.0 * report.confidence;
    Ok(html! {
        section {
            h2 { (model) }
            @if !measured.is_empty() {
                div.scroll { (figures(&measured, &results)) }
                @if has_mark(&results) { p.note { (TOO_FEW) "." } }
                @if let Some(drawn) = drawn { p.note { "In brackets: " (confidence) " % intervals from " (drawn) "." } }
                div.plots { @for plot in &plots { figure { (PreEscaped(plot)) } } }
                h3 { "FNMR at fixed false match rates" }
                div.plots { @for m in &measured { (operating_points(m)) } }
            }
            @for searched in report.searched.iter().filter(|s| s.model == model) {
                h3 { "Search in gallery " (searched.gallery) }
                pre { (crate::eval::identification_table(&[(searched.gallery.as_str(), &searched.result)])) }
            }
            @for m in &measured {
                @if let Some(hardest) = &m.hardest {
                    h3 { (m.setting) ": the hardest pairs of one person" }
                    (faces(&hardest.genuine))
                    h3 { (m.setting) ": the hardest pairs of two people" }
                    (faces(&hardest.impostor))
                }
            }
        }
    })
}

fn figures(measured: &[&Measured], results: &[&SettingResult]) -> Markup {
    html! {
        table {
            thead { tr { th {} @for m in measured { th { (m.setting) } } } }
            tbody {
                @for (name, cells) in figure_rows(results) {
                    tr { th { (name) } @for cell in &cells { td { (cell) } } }
                }
                tr { th { "genuine pairs" } @for r in results { td { (r.metrics.num_genuine) } } }
                tr { th { "impostor pairs" } @for r in results { td { (r.metrics.num_impostor) } } }
            }
        }
    }
}

fn operating_points(measured: &Measured) -> Markup {
    let per_cent = |v: f64| format!("{:.2}", 100.0 * v);
    let fnmr = |at: &AtFmr| {
        at.fnmr.map_or("not measurable".to_owned(), |fnmr| {
            let ends = at.fnmr_interval.map(|i| format!(" [{}, {}]", per_cent(i.low), per_cent(i.high)));
            per_cent(fnmr) + &ends.unwrap_or_default()
        })
    };
    html! {
        div.scroll {
            table {
                caption { (measured.setting) }
                thead { tr { th { "FMR" } th { "threshold" } th { "FNMR %" } } }
                tbody {
                    @for at in &measured.result.at_fmr {
                        tr {
                            th { (format!("{:e}", at.fmr_target)) }
                            td { (at.threshold.map_or("-".to_owned(), |t| format!("{t:.4}"))) }
                            td { (fnmr(at)) }
                        }
                    }
                }
            }
        }
    }
}

fn faces(pairs: &[FacePair]) -> Markup {
    html! {
        div.faces {
            @for pair in pairs {
                figure {
                    @for (image, name) in pair.images.iter().zip(&pair.names) {
                        img src=(image) alt=(name) title=(name) width="112" height="112";
                    }
                    figcaption { (format!("{:.3}", pair.score)) br; (pair.names[0]) br; (pair.names[1]) }
                }
            }
        }
    }
}
