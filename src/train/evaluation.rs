//! Evaluation of an arm on the test set, and the paired tests between the arms.

use std::path::{Path, PathBuf};

use super::arm::Arm;
use super::outcome::{Event, PairedTest};
use crate::data::TestSet;
use crate::error::{Error, Result};
use crate::eval::{
    Comparisons, EvalConfig, Evaluation, Figures, Setting, SettingResult, compare, compare_as_is, compare_systems,
    figures, read_scores, write_scores,
};
use crate::models::Model;

/// Name of photos with real masks among the settings.
pub(super) const REAL_MASKS: &str = "real-masks";

/// Test sets of an experiment, and how they are evaluated.
pub(super) struct TestSets<'a> {
    pub config: &'a EvalConfig,
    pub test: &'a TestSet,
    /// Photos of people with real masks.
    pub real_masks: Option<&'a TestSet>,
}

impl TestSets<'_> {
    /// Evaluates a model on the test set and on the photos with real masks, and writes its scores to `folder`, if
    /// given, on the first rank.
    ///
    /// # Errors
    /// When an image cannot be read, the network fails, or a file cannot be written.
    pub fn evaluate(
        &self,
        model: &Model,
        folder: Option<&Path>,
        on: &mut dyn FnMut(Event),
    ) -> Result<(Evaluation, Option<SettingResult>)> {
        let (test, config) = (self.test, self.config);
        let mut progress = |done, total| on(Event::Embedded { done, total });
        let scores = compare(model, test, config, &mut progress)?;
        let evaluation = Evaluation::of(&figures(scores.iter().map(|(s, c)| (*s, c)), test.num_folds, config)?)?;
        let folder = folder.filter(|_| model.machine().ranks().is_first());
        if let Some(folder) = folder {
            std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
            for (setting, comparisons) in &scores {
                write(folder, setting.name(), comparisons, test)?;
            }
        }
        let Some(photos) = self.real_masks else { return Ok((evaluation, None)) };
        let comparisons = compare_as_is(model, photos, config, progress)?;
        if let Some(folder) = folder {
            write(folder, REAL_MASKS, &comparisons, photos)?;
        }
        let real_masks = Figures::new(&comparisons, photos.num_folds, &config.bootstrap)?.compute(None)?;
        Ok((evaluation, Some(real_masks)))
    }

    /// Tests every student against augmentation alone, in every setting, on the scores that [`Self::evaluate`] wrote to
    /// the arms' folders in `out`. Returns nothing without both, or without a bootstrap. An arm without scores, which
    /// an earlier version trained, is left out with a notice.
    ///
    /// # Errors
    /// When a file of scores cannot be read.
    pub fn paired(&self, finished: &[Arm], out: &Path, on: &mut dyn FnMut(Event)) -> Result<Vec<PairedTest>> {
        let (baseline, bootstrap) = (Arm::Aug, &self.config.bootstrap);
        let settings = Setting::ALL.iter().map(|setting| setting.name());
        let settings: Vec<&str> = settings.chain(self.real_masks.map(|_| REAL_MASKS)).collect();
        let scores = |arm: Arm, setting: &str| score_file(out, arm, setting);
        let mut measured = Vec::new();
        for &arm in finished.iter().filter(|arm| **arm == baseline || arm.distills()) {
            match settings.iter().map(|setting| scores(arm, setting)).find(|file| !file.exists()) {
                None => measured.push(arm),
                Some(file) => on(Event::Notice(format!(
                    "{} is not compared with the other arms: there is no {}",
                    arm.title(),
                    file.display()
                ))),
            }
        }
        let students: Vec<Arm> = measured.iter().copied().filter(|arm| arm.distills()).collect();
        if students.is_empty() || !measured.contains(&baseline) || bootstrap.replicates == 0 {
            return Ok(Vec::new());
        }
        let mut tests = Vec::new();
        for setting in settings {
            let of = |arm: Arm| Ok(read_scores(&scores(arm, setting), None)?.comparisons);
            let systems = [&[baseline], &students[..]].concat().into_iter().map(of).collect::<Result<Vec<_>>>()?;
            for figure in compare_systems(&systems, bootstrap)? {
                for (&arm, difference) in students.iter().zip(figure.differences) {
                    let Some(difference) = difference else { continue };
                    let (setting, metric) = (setting.to_owned(), figure.figure.to_owned());
                    tests.push(PairedTest { arm, baseline, setting, metric, difference });
                }
            }
        }
        Ok(tests)
    }
}

/// Returns the folder of an arm's scores in the arm's folder.
pub(super) fn scores_folder(arm_folder: &Path) -> PathBuf {
    arm_folder.join("scores")
}

/// Returns the file of an arm's scores in the folder of its training.
pub(super) fn score_file(out: &Path, arm: Arm, setting: &str) -> PathBuf {
    file(&scores_folder(&out.join(arm.name())), setting)
}

fn file(folder: &Path, setting: &str) -> PathBuf {
    folder.join(setting).with_extension("csv")
}

fn write(folder: &Path, setting: &str, comparisons: &Comparisons, test: &TestSet) -> Result<()> {
    let images = |k: usize| [test.pairs[k].a, test.pairs[k].b].map(|image| test.images.name(image));
    write_scores(&file(folder, setting), comparisons, images, |label| test.images.identity_name(label)).map(drop)
}
