//! Results as a table for people.

use super::protocol::{Evaluation, Setting};

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
            let or_dash = |v: Option<f64>| v.map_or("-".to_owned(), |v| format!("{v:.2}"));
            let (fmr100, fdr) = (or_dash(m.fmr100.map(|v| 100.0 * v)), or_dash(m.fdr));
            line += &format!(" | {:>7.2} {fmr100:>8} {fdr:>7}", 100.0 * m.eer);
        }
        lines.push(line);
    }
    lines.join("\n")
}
