//! Results as plain-text tables.

use super::bootstrap::Interval;
use super::config::Setting;
use super::figures::SettingResult;
use super::groups::{GroupRates, Groups};
use super::identification::Identification;
use super::metrics::Metrics;
use super::paired::PairedFigure;
use super::protocol::Evaluation;

/// Footnote of a table with marked rates.
pub const TOO_FEW: &str = "* at zero false matches: too few impostor pairs to measure this FMR";

/// Returns a text table with a row for each named evaluation: EER, FMR100 and FMR1000 in per cent and the FDR, for U-U,
/// U-M and M-M.
pub fn table(evaluations: &[(&str, &Evaluation)]) -> String {
    let width = evaluations.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0).max(5);
    let mut lines = vec![format!("{:width$}", "")];
    let mut header = format!("{:width$}", "model");
    for setting in Setting::TABLE {
        lines[0] += &format!(" | {:^34}", setting.name());
        header += &format!(" | {COLUMNS}");
    }
    let rule: String = header.chars().map(|c| if c == '|' { '+' } else { '-' }).collect();
    lines.extend([header, rule]);
    for (name, evaluation) in evaluations {
        let mut line = format!("{name:width$}");
        for setting in Setting::TABLE {
            let cells = evaluation.settings.get(&setting).map(|result| columns(&result.metrics));
            line += &format!(" | {:>34}", or_dash(cells));
        }
        lines.push(line);
    }
    finish(lines)
}

/// Returns the same table for images compared without drawn masks: a row for each named result.
pub fn table_as_is(title: &str, results: &[(&str, &SettingResult)]) -> String {
    let width = results.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0).max(5);
    let header = format!("{:width$} | {COLUMNS}", "model");
    let rule = header.chars().map(|c| if c == '|' { '+' } else { '-' }).collect();
    let mut lines = vec![format!("{:width$} | {title}", ""), header, rule];
    lines.extend(results.iter().map(|(name, r)| format!("{name:width$} | {}", columns(&r.metrics))));
    finish(lines)
}

/// Headings of the columns that [`columns`] fills.
const COLUMNS: &str = "  EER % FMR100 % FMR1000 %      FDR";

fn columns(m: &Metrics) -> String {
    let (fmr100, fmr1000) = (at_fmr(m.fmr100, m, 100), at_fmr(m.fmr1000, m, 1000));
    let fdr = or_dash(m.fdr.map(|v| format!("{v:.2}")));
    format!("{:>7.2} {fmr100:>8} {fmr1000:>9} {fdr:>8}", 100.0 * m.eer)
}

/// Error rate in per cent, marked `*` if there are too few impostor scores to measure an FMR of 1 in `one_in`.
fn at_fmr(rate: f64, m: &Metrics, one_in: usize) -> String {
    format!("{}{}", percent(rate), if m.num_impostor < one_in { "*" } else { "" })
}

/// Joins the lines and adds the footnote if a rate is marked.
fn finish(mut lines: Vec<String>) -> String {
    if lines.iter().any(|line| line.contains('*')) {
        lines.push(TOO_FEW.to_owned());
    }
    lines.iter().map(|line| line.trim_end()).collect::<Vec<_>>().join("\n")
}

/// Formats one metric of a setting.
type Figure = fn(&SettingResult) -> String;

fn percent(v: f64) -> String {
    format!("{:.2}", 100.0 * v)
}

/// Value with its interval, if it has one.
fn with(text: impl Fn(f64) -> String, value: f64, interval: Option<Interval>) -> String {
    text(value) + &ends(text, interval)
}

fn ends(text: impl Fn(f64) -> String, interval: Option<Interval>) -> String {
    interval.map(|i| format!(" [{}, {}]", text(i.low), text(i.high))).unwrap_or_default()
}

fn or_dash(v: Option<String>) -> String {
    v.unwrap_or_else(|| "-".to_owned())
}

/// Returns all metrics of one evaluation as a text table, one row per metric and one column per setting, with intervals
/// in brackets.
pub fn details(evaluation: &Evaluation) -> String {
    let columns: Vec<_> = evaluation.settings.iter().map(|(setting, result)| (setting.name(), result)).collect();
    details_of(&columns)
}

/// Returns the same table for any results, one column each.
pub fn details_of(columns: &[(&str, &SettingResult)]) -> String {
    let results: Vec<&SettingResult> = columns.iter().map(|(_, result)| *result).collect();
    let row = |name: &str, cells: Vec<String>| {
        let cells = cells.iter().map(|cell| format!(" {cell:>22}"));
        format!("  {name:36}{}", cells.collect::<String>())
    };
    let mut lines = vec![row("", columns.iter().map(|(title, _)| (*title).to_owned()).collect())];
    lines.extend(figure_rows(&results).into_iter().map(|(name, cells)| row(name, cells)));
    finish(lines)
}

/// Returns the rows of a table of results: the name of each metric and a cell for every result, with the interval in
/// brackets. Metrics that no result has are left out.
pub fn figure_rows(results: &[&SettingResult]) -> Vec<(&'static str, Vec<String>)> {
    let figures: [(&'static str, Figure); 12] = [
        ("EER %", |r| with(percent, r.metrics.eer, r.intervals.and_then(|i| i.eer))),
        ("FMR100 %", |r| {
            at_fmr(r.metrics.fmr100, &r.metrics, 100) + &ends(percent, r.intervals.and_then(|i| i.fmr100))
        }),
        ("FMR1000 %", |r| {
            at_fmr(r.metrics.fmr1000, &r.metrics, 1000) + &ends(percent, r.intervals.and_then(|i| i.fmr1000))
        }),
        ("FDR", |r| or_dash(r.metrics.fdr.map(|v| with(|v| format!("{v:.2}"), v, r.intervals.and_then(|i| i.fdr))))),
        ("G-mean", |r| with(|v| format!("{v:.3}"), r.metrics.g_mean, r.intervals.and_then(|i| i.g_mean))),
        ("I-mean", |r| with(|v| format!("{v:.3}"), r.metrics.i_mean, r.intervals.and_then(|i| i.i_mean))),
        ("AUC", |r| with(|v| format!("{v:.4}"), r.metrics.auc, r.intervals.and_then(|i| i.auc))),
        ("accuracy over folds %", |r| {
            or_dash(r.accuracy.as_ref().map(|a| match a.interval {
                Some(_) => with(percent, a.mean, a.interval),
                None => format!("{} +- {}", percent(a.mean), percent(a.std)),
            }))
        }),
        ("TAR at FAR 1e-3 over folds %", |r| {
            or_dash(r.tar_at_far.as_ref().map(|t| with(percent, t.tar_mean, t.interval)))
        }),
        ("FNMR % at U-U threshold of FMR 1 %", |r| {
            or_dash(r.at_unmasked(1e-2).and_then(|at| Some(with(percent, at.fnmr?, at.fnmr_interval))))
        }),
        ("FMR % at U-U threshold of FMR 1 %", |r| {
            or_dash(r.at_unmasked(1e-2).and_then(|at| Some(with(percent, at.fmr?, at.fmr_interval))))
        }),
        ("FNMR % at U-U threshold of FMR 0.1 %", |r| {
            or_dash(r.at_unmasked(1e-3).and_then(|at| Some(with(percent, at.fnmr?, at.fnmr_interval))))
        }),
    ];
    let rows = figures.into_iter().map(|(name, figure)| (name, results.iter().map(|result| figure(result)).collect()));
    // Leave out what does not apply, such as fold accuracy without folds or U-U thresholds without masks.
    rows.filter(|(_, cells): &(_, Vec<String>)| cells.iter().any(|cell| cell != "-")).collect()
}

/// Returns the error rates at the thresholds for the target false match rates as a text table.
pub fn operating_points(result: &SettingResult) -> String {
    let mut lines = vec![format!("  {:>8} {:>11} {:>22} {:>22}", "FMR", "threshold", "TAR %", "FNMR %")];
    for at in &result.at_fmr {
        let Some((threshold, fnmr)) = at.threshold.zip(at.fnmr) else {
            let num = result.metrics.num_impostor;
            lines.push(format!("  {:>8e} not measurable on {num} impostor comparisons", at.fmr_target));
            continue;
        };
        let tar = at.fnmr_interval.map(|i| Interval { low: 1.0 - i.high, high: 1.0 - i.low });
        let (tar, fnmr) = (with(percent, 1.0 - fnmr, tar), with(percent, fnmr, at.fnmr_interval));
        lines.push(format!("  {:>8e} {threshold:>11.4} {tar:>22} {fnmr:>22}", at.fmr_target));
    }
    lines.join("\n")
}

/// Returns the identification metrics of each gallery as a text table, one row per metric.
pub fn identification_table(galleries: &[(&str, &Identification)]) -> String {
    let mut lines = Vec::new();
    for (name, found) in galleries {
        let Identification { num_gallery, num_mated, num_nonmated, .. } = found;
        lines.push(format!("  {name}: {num_gallery} people, {num_mated} mated and {num_nonmated} non-mated searches"));
        let ranks = found
            .at_rank
            .iter()
            .map(|at| format!("rank {} %", at.rank))
            .zip(found.at_rank.iter().map(|at| with(percent, at.rate, at.interval)));
        let targets = found.at_fpir.iter().map(|at| {
            let cell = at.tpir.map(|tpir| with(percent, tpir, at.tpir_interval));
            let cell = cell.unwrap_or_else(|| format!("not measurable on {num_nonmated} non-mated searches"));
            (format!("TPIR at FPIR {} %", 100.0 * at.fpir_target), cell)
        });
        lines.extend(ranks.chain(targets).map(|(name, cell)| format!("    {name:24} {cell:>22}")));
    }
    lines.join("\n")
}

/// Returns the error rates of groups at one threshold as a text table.
pub fn group_table(groups: &Groups) -> String {
    let width = groups.rates.iter().map(|r| r.group.chars().count()).max().unwrap_or(0).max(5);
    let header = format!("  {:width$} {:>20} {:>8} {:>20} {:>9}", "group", "FNMR %", "genuine", "FMR %", "impostor");
    let row = |r: &GroupRates| {
        let cell = |rate: Option<f64>, interval| or_dash(rate.map(|rate| with(percent, rate, interval)));
        let (fnmr, fmr) = (cell(r.fnmr, r.fnmr_interval), cell(r.fmr, r.fmr_interval));
        format!("  {:width$} {fnmr:>20} {:>8} {fmr:>20} {:>9}", r.group, r.num_genuine, r.num_impostor)
    };
    std::iter::once(header).chain(groups.rates.iter().map(row)).collect::<Vec<_>>().join("\n")
}

/// Returns systems side by side as a text table, one block per metric. `*` marks a difference from the first system
/// with a p-value below `1 - confidence`; each metric of each system is tested on its own.
pub fn comparison_table(names: &[String], figures: &[PairedFigure], confidence: f64) -> String {
    let width = names.iter().map(|name| name.chars().count()).max().unwrap_or(0);
    let mut lines = Vec::new();
    for PairedFigure { figure, values, differences } in figures {
        // Rates are in per cent; the Fisher ratio is not a rate.
        let (title, scale) =
            if *figure == "FDR" { ((*figure).to_owned(), 1.0) } else { (format!("{figure} %"), 100.0) };
        lines.push(format!("{title:width$}  {:>8} {:>28} {:>8}", "value", "minus the first", "p"));
        let number = |v: f64| format!("{:.2}", scale * v);
        for (i, (name, value)) in names.iter().zip(values).enumerate() {
            let value = or_dash(value.map(number));
            let difference = i.checked_sub(1).and_then(|i| differences[i]);
            let rest = difference.map(|d| {
                let mark = if d.p_value < 1.0 - confidence { "*" } else { "" };
                let signed = |v: f64| format!("{:+.2}", scale * v);
                let ends =
                    format!("{} [{}, {}]", signed(d.difference), signed(d.interval.low), signed(d.interval.high));
                format!(" {ends:>28} {:>7.3}{mark}", d.p_value)
            });
            lines.push(format!("{name:width$}  {value:>8}{}", rest.unwrap_or_default()));
        }
        lines.push(String::new());
    }
    lines.push(format!(
        "* differs from the first at the {:.0} % level, each metric tested on its own: one in {:.0} is marked by chance alone",
        100.0 * confidence,
        1.0 / (1.0 - confidence)
    ));
    lines.join("\n")
}
