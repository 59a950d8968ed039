//! Results as a table for people.

use super::metrics::Metrics;
use super::protocol::{Evaluation, Setting, SettingResult};

/// What the tables say below themselves where a figure is marked.
const TOO_FEW: &str = "* at no false match at all: there are fewer impostor pairs than the rate needs";

/// Returns a text table: a row for each named evaluation; for U-U, U-M and M-M the EER, FMR100 and FMR1000 in per cent
/// and the FDR.
pub fn table(evaluations: &[(&str, &Evaluation)]) -> String {
    let width = evaluations.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0).max(5);
    let mut lines = vec![format!("{:width$}", "")];
    let mut header = format!("{:width$}", "model");
    for setting in Setting::ALL {
        lines[0] += &format!(" | {:^34}", setting.name());
        header += &format!(" | {COLUMNS}");
    }
    let rule: String = header.chars().map(|c| if c == '|' { '+' } else { '-' }).collect();
    lines.extend([header, rule]);
    for (name, evaluation) in evaluations {
        let mut line = format!("{name:width$}");
        for setting in Setting::ALL {
            line += &format!(" | {}", columns(&evaluation.get(setting).metrics));
        }
        lines.push(line);
    }
    finish(lines)
}

/// Returns the same for images that were compared as they are: a row for each named result.
pub fn table_as_is(title: &str, results: &[(&str, &SettingResult)]) -> String {
    let width = results.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0).max(5);
    let header = format!("{:width$} | {COLUMNS}", "model");
    let rule = header.chars().map(|c| if c == '|' { '+' } else { '-' }).collect();
    let mut lines = vec![format!("{:width$} | {title}", ""), header, rule];
    lines.extend(results.iter().map(|(name, r)| format!("{name:width$} | {}", columns(&r.metrics))));
    finish(lines)
}

/// Heads of the columns that [`columns`] fills.
const COLUMNS: &str = "  EER % FMR100 % FMR1000 %      FDR";

fn columns(m: &Metrics) -> String {
    let (fmr100, fmr1000) = (at_fmr(m.fmr100, m, 100), at_fmr(m.fmr1000, m, 1000));
    let fdr = or_dash(m.fdr.map(|v| format!("{v:.2}")));
    format!("{:>7.2} {fmr100:>8} {fmr1000:>9} {fdr:>8}", 100.0 * m.eer)
}

/// An error rate in per cent, marked if its FMR of 1 in `one_in` cannot be measured on the impostor scores.
fn at_fmr(rate: f64, m: &Metrics, one_in: usize) -> String {
    format!("{:.2}{}", 100.0 * rate, if m.num_impostor < one_in { "*" } else { "" })
}

/// The lines, with the note that they call for.
fn finish(mut lines: Vec<String>) -> String {
    if lines.iter().any(|line| line.contains('*')) {
        lines.push(TOO_FEW.to_owned());
    }
    lines.iter().map(|line| line.trim_end()).collect::<Vec<_>>().join("\n")
}

/// A figure of a setting, as text.
type Figure = fn(&SettingResult) -> String;

fn percent(v: f64) -> String {
    format!("{:.2} %", 100.0 * v)
}

fn or_dash(v: Option<String>) -> String {
    v.unwrap_or_else(|| "-".to_owned())
}

/// Returns all figures of one evaluation as a text table, a row a figure and a column a setting.
pub fn details(evaluation: &Evaluation) -> String {
    let figures: [(&str, Figure); 11] = [
        ("EER", |r| percent(r.metrics.eer)),
        ("FMR100 %", |r| at_fmr(r.metrics.fmr100, &r.metrics, 100)),
        ("FMR1000 %", |r| at_fmr(r.metrics.fmr1000, &r.metrics, 1000)),
        ("FDR", |r| or_dash(r.metrics.fdr.map(|v| format!("{v:.3}")))),
        ("G-mean", |r| format!("{:.4}", r.metrics.g_mean)),
        ("I-mean", |r| format!("{:.4}", r.metrics.i_mean)),
        ("AUC", |r| format!("{:.5}", r.metrics.auc)),
        ("accuracy over folds", |r| format!("{} +- {}", percent(r.accuracy.mean), percent(r.accuracy.std))),
        ("TAR at FAR 1e-3", |r| or_dash(r.tar_at_far.as_ref().map(|t| percent(t.tar_mean)))),
        ("FNMR at the U-U threshold of FMR 1 %", |r| or_dash(r.fnmr_at_unmasked_fmr100.map(percent))),
        ("FMR at that threshold", |r| or_dash(r.fmr_at_unmasked_fmr100.map(percent))),
    ];
    let row = |name: &str, cells: [String; 3]| {
        let [uu, um, mm] = cells;
        format!("  {name:36} {uu:>18} {um:>18} {mm:>18}")
    };
    let mut lines = vec![row("", Setting::ALL.map(|s| s.name().to_owned()))];
    lines.extend(figures.iter().map(|(name, figure)| row(name, Setting::ALL.map(|s| figure(evaluation.get(s))))));
    finish(lines)
}
