//! Human-readable results of a training.

use std::collections::BTreeMap;

use crate::eval::{Difference, Evaluation, Setting, SettingResult, table, table_as_is};
use crate::train::{Arm, ArmOutcome, PairedTest};

/// A p value below this is called a difference.
const SIGNIFICANT: f64 = 0.05;

/// Returns the table of all arms, and the one on real masks if there is one; none before an arm is finished.
pub(super) fn tables(arms: &BTreeMap<Arm, ArmOutcome>) -> Vec<String> {
    let rows: Vec<(&str, &Evaluation)> = arms.iter().map(|(arm, outcome)| (arm.title(), &outcome.evaluation)).collect();
    let real = arms.iter().filter_map(|(arm, outcome)| Some((arm.title(), outcome.real_masks.as_ref()?)));
    let real: Vec<(&str, &SettingResult)> = real.collect();
    let mut tables = Vec::new();
    if !rows.is_empty() {
        tables.push(table(&rows));
    }
    if !real.is_empty() {
        tables.push(table_as_is("real masks", &real));
    }
    tables
}

/// Returns the equal error rates in the settings of the papers' tables, as far as they were measured.
pub(super) fn eers(evaluation: &Evaluation) -> String {
    let of = |setting: Setting| {
        let result = evaluation.settings.get(&setting)?;
        Some(format!("{} {:.2} %", setting.name(), 100.0 * result.metrics.eer))
    };
    format!("EER {}", Setting::TABLE.into_iter().filter_map(of).collect::<Vec<_>>().join(", "))
}

/// Returns a few sentences that say what the table shows and what the paired tests say of it.
pub(super) fn conclusion(arms: &BTreeMap<Arm, ArmOutcome>, tests: &[PairedTest]) -> String {
    let eer = |arm: Arm, setting: Setting| Some(100.0 * arms.get(&arm)?.evaluation.get(setting)?.metrics.eer);
    let mut sentences = vec!["EER: lower is better, 50 % is guessing.".to_owned()];
    if let (Some(clean), Some(masked)) = (eer(Arm::Teacher, Setting::UU), eer(Arm::Teacher, Setting::UM)) {
        sentences.push(format!("A mask on the probe raises the teacher's EER from {clean:.1} % to {masked:.1} %."));
    }
    let verdicts: Vec<String> = Arm::ALL.into_iter().filter_map(|arm| verdicts(arm, tests)).collect();
    let mut text = sentences.join(" ");
    if !verdicts.is_empty() {
        text += "\nAgainst augmentation only, by a paired bootstrap over the people tested:\n";
        text += &verdicts.join("\n");
    }
    text
}

/// Returns a sentence on an arm's EER with masked faces, against that of the baseline; none if it was not tested.
fn verdicts(arm: Arm, tests: &[PairedTest]) -> Option<String> {
    let of = |setting: Setting| {
        let is_wanted = |t: &&PairedTest| t.arm == arm && t.metric == "EER" && t.setting == setting.name();
        tests.iter().find(is_wanted).map(verdict)
    };
    let words: Vec<String> = [Setting::UM, Setting::MM].into_iter().filter_map(of).collect();
    (!words.is_empty()).then(|| format!("{} is {}.", arm.title(), words.join(" and ")))
}

/// Returns the verdict of a test on a metric of which less is better.
fn verdict(test: &PairedTest) -> String {
    let Difference { difference, p_value, .. } = test.difference;
    let word = match p_value < SIGNIFICANT {
        true if difference < 0.0 => "better",
        true => "worse",
        false => "not told apart",
    };
    let direction = if difference < 0.0 { "lower" } else { "higher" };
    let points = 100.0 * difference.abs();
    format!("{word} on {} (EER {points:.1} points {direction}, p = {p_value:.3})", test.setting)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::Interval;

    #[test]
    fn a_difference_is_called_one_only_where_the_test_finds_it() {
        let test = |arm: Arm, setting: Setting, difference: f64, p_value: f64| PairedTest {
            arm,
            baseline: Arm::Aug,
            setting: setting.name().to_owned(),
            metric: "EER".to_owned(),
            difference: Difference { difference, interval: Interval { low: -0.1, high: 0.1 }, p_value },
        };
        let tests = [
            test(Arm::Lg, Setting::UM, -0.012, 0.21),
            test(Arm::Lg, Setting::MM, 0.02, 0.04),
            test(Arm::Hg, Setting::UM, -0.033, 0.002),
            test(Arm::Hg, Setting::UU, -0.033, 0.002),
        ];
        let text = conclusion(&BTreeMap::new(), &tests);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[2..],
            [
                "MaskInv-LG is not told apart on U-M (EER 1.2 points lower, p = 0.210) and worse on M-M (EER 2.0 points \
                 higher, p = 0.040).",
                "MaskInv-HG is better on U-M (EER 3.3 points lower, p = 0.002).",
            ]
        );
    }
}
