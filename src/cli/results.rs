//! What came out of a training, for people.

use std::collections::BTreeMap;

use crate::eval::{Evaluation, Setting, SettingResult, table, table_as_is};
use crate::train::{Arm, ArmOutcome};

/// The figures of all arms, and those on real masks if there are; none before there are any.
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

/// The equal error rates of the settings of the papers' tables, as far as they were measured.
pub(super) fn eers(evaluation: &Evaluation) -> String {
    let of = |setting: Setting| {
        let result = evaluation.settings.get(&setting)?;
        Some(format!("{} {:.2} %", setting.name(), 100.0 * result.metrics.eer))
    };
    format!("EER {}", Setting::TABLE.into_iter().filter_map(of).collect::<Vec<_>>().join(", "))
}

/// A sentence or three that say what the table shows, and no more than that.
pub(super) fn conclusion(arms: &BTreeMap<Arm, ArmOutcome>) -> String {
    let eer = |arm: Arm, setting: Setting| Some(100.0 * arms.get(&arm)?.evaluation.get(setting).metrics.eer);
    let mut sentences = vec!["EER: lower is better, 50 % is guessing.".to_owned()];
    if let (Some(clean), Some(masked)) = (eer(Arm::Teacher, Setting::UU), eer(Arm::Teacher, Setting::UM)) {
        sentences.push(format!("A mask on the probe takes the teacher's from {clean:.1} % to {masked:.1} %."));
    }
    let best = [Arm::Lg, Arm::Hg].into_iter().filter_map(|arm| Some((arm, eer(arm, Setting::UM)?)));
    if let Some((arm, student)) = best.min_by(|a, b| a.1.total_cmp(&b.1)) {
        let compared = match eer(Arm::Aug, Setting::UM) {
            Some(aug) if student < aug => format!(", with masks in training alone {aug:.1} %"),
            Some(aug) => format!("; masks in training alone do as well, {aug:.1} %"),
            None => String::new(),
        };
        sentences.push(format!("The student that learned from it, {}, has {student:.1} %{compared}.", arm.title()));
    }
    sentences.join(" ")
}
