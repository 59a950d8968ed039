//! Results as a table for people.

use super::protocol::{Evaluation, Setting, SettingResult};

/// Returns a text table: a row for each named evaluation; for U-U, U-M and M-M the EER and FMR100 in per cent and the
/// FDR. A figure that the pairs are too few for is a dash.
pub fn table(evaluations: &[(&str, &Evaluation)]) -> String {
    let width = evaluations.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0).max(5);
    let mut lines = vec![format!("{:width$}", "")];
    let mut header = format!("{:width$}", "model");
    for setting in Setting::ALL {
        lines[0] += &format!(" | {:^24}", setting.name());
        header += &format!(" | {:>7} {:>8} {:>7}", "EER %", "FMR100 %", "FDR");
    }
    let rule: String = header.chars().map(|c| if c == '|' { '+' } else { '-' }).collect();
    lines.extend([header, rule]);
    for (name, evaluation) in evaluations {
        let mut line = format!("{name:width$}");
        for setting in Setting::ALL {
            let m = &evaluation.get(setting).metrics;
            let rounded = |v: Option<f64>| or_dash(v.map(|v| format!("{v:.2}")));
            let (fmr100, fdr) = (rounded(m.fmr100.map(|v| 100.0 * v)), rounded(m.fdr));
            line += &format!(" | {:>7.2} {fmr100:>8} {fdr:>7}", 100.0 * m.eer);
        }
        lines.push(line);
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
        ("FMR100", |r| or_dash(r.metrics.fmr100.map(percent))),
        ("FMR1000", |r| or_dash(r.metrics.fmr1000.map(percent))),
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
    lines.join("\n")
}
