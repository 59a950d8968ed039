//! Output of an evaluation: text, JSON and a report.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use image::RgbImage;

use super::{Job, Named, Protocol};
use crate::cli::photos;
use crate::cli::tell;
use crate::cli::{print, print_json};
use crate::data::Dataset;
use crate::eval::{Evaluation, Figures, Setting, SettingResult, write_scores};
use crate::eval::{details, identification_table, operating_points, table, table_as_is};
use crate::report::{EvaluationReport, Hardest, LeftOut, Measured, ModelReport, Report, Searched};

/// Results of a protocol.
#[derive(Default)]
pub(super) struct Output {
    /// Human-readable description of the test set.
    pub title: String,
    /// SHA-256 of the images and of the lists that say how they are compared; computed for reports only.
    pub data_sha256: Option<String>,
    /// What is not compared.
    pub left_out: LeftOut,
    /// Figures by setting, one entry per model in order; empty for IJB.
    pub evaluations: Vec<Evaluation>,
    /// Human-readable description of the photos behind `real_masks`.
    pub real_masks_title: String,
    /// Figures on photos of real masks, one entry per model in order.
    pub real_masks: Vec<SettingResult>,
    /// Curves, histograms and figures of each model and setting, for the report.
    pub measured: Vec<Measured>,
    /// 1:N results of each model and gallery.
    pub searched: Vec<Searched>,
    /// Further text to print, one entry per model.
    pub notes: Vec<String>,
}

impl Output {
    /// Records a model's results in one setting, and writes its scores if a folder for them is given.
    pub fn take(
        &mut self,
        run: &Job,
        model: &str,
        setting: &str,
        figures: &Figures,
        result: SettingResult,
        pairs: &Pairs,
    ) -> Result<()> {
        run.end_if_interrupted();
        let comparisons = figures.comparisons();
        if comparisons.is_constant() {
            let what = "all pairs have one score: the network gives every image the same embedding";
            tell(format_args!("{model}, {setting}: {what}"));
        }
        let mut measured = Measured::new(model, setting, result, figures.scores());
        if let Some(folder) = run.scores_folder()? {
            let file = format!("{}-{setting}.csv", file_name(model));
            write_scores(&folder.join(&file), comparisons, &pairs.images, &pairs.person)?;
            measured.scores = run.args.report.as_ref().map(|_| format!("scores/{file}"));
        }
        if let Some(face) = pairs.face.as_ref().filter(|_| run.args.faces > 0) {
            measured.hardest = Some(Hardest::find(comparisons, run.args.faces, face)?);
        }
        self.measured.push(measured);
        Ok(())
    }

    /// Prints the figures and writes the report, if one is requested.
    pub fn finish(self, run: &Job) -> Result<()> {
        let record = self.record(run)?;
        let text = self.text(run)?;
        if run.args.json {
            print_json(&record)?;
        } else {
            print(&text)?;
        }
        let Some(staged) = &run.outputs.report else { return Ok(()) };
        let provenance = provenance(run, &record);
        let confidence = run.config.eval.bootstrap.confidence;
        let Self { title, measured, searched, .. } = self;
        Report { title, record, provenance, measured, searched, confidence }.write(staged.path())?;
        Ok(())
    }

    fn text(&self, run: &Job) -> Result<String> {
        let names = || run.models.iter().map(|m| m.name.as_str());
        let mut text = format!("{}:\n", self.title);
        let evaluations: Vec<(&str, &Evaluation)> = names().zip(&self.evaluations).collect();
        if !evaluations.is_empty() {
            text += &format!("\n{}", table(&evaluations));
        }
        let rows: Vec<(&str, &SettingResult)> = names().zip(&self.real_masks).collect();
        if !rows.is_empty() {
            text += &format!("\n\n{}:\n\n{}", self.real_masks_title, table_as_is("real masks", &rows));
        }
        for (name, evaluation) in &evaluations {
            text += &format!("\n\n{name}:\n{}", details(evaluation));
        }
        // These protocols have enough impostor pairs to measure low rates.
        let has_rates = |m: &&Measured| m.setting == TEMPLATES || run.args.protocol == Protocol::AllPairs;
        for measured in self.measured.iter().filter(has_rates) {
            let Measured { model, setting, result, .. } = measured;
            text += &format!("\n\n{model}, {setting}:\n{}", operating_points(result));
        }
        for searched in &self.searched {
            text += &format!("\n\n{}:\n", searched.model);
            text += &identification_table(&[(searched.gallery.as_str(), &searched.result)]);
        }
        for note in &self.notes {
            text += &format!("\n\n{note}");
        }
        Ok(text)
    }

    /// Returns the figures, with everything needed to reproduce them.
    fn record(&self, run: &Job) -> Result<EvaluationReport> {
        let mut models = BTreeMap::new();
        for (i, named) in run.models.iter().enumerate() {
            let of_model = self.measured.iter().filter(|m| m.model == named.name);
            let settings = match self.evaluations.get(i) {
                Some(evaluation) => {
                    let by_name =
                        |(setting, result): (&Setting, &SettingResult)| (setting.name().to_owned(), result.clone());
                    evaluation.settings.iter().map(by_name).collect()
                }
                None => of_model.map(|m| (m.setting.clone(), m.result.clone())).collect(),
            };
            let galleries = self.searched.iter().filter(|s| s.model == named.name);
            let model = ModelReport {
                file: named.file.to_string(),
                sha256: named.file.sha256()?,
                network: named.model.config().clone(),
                preprocessing: named.model.preprocessing().clone(),
                settings,
                galleries: galleries.map(|s| (s.gallery.clone(), s.result.clone())).collect(),
            };
            models.insert(named.name.clone(), model);
        }
        let real_masks = run.models.iter().zip(&self.real_masks);
        Ok(EvaluationReport {
            version: env!("CARGO_PKG_VERSION"),
            commit: env!("MASKINV_COMMIT"),
            device: run.machine.to_string(),
            threads: rayon::current_num_threads(),
            protocol: run.protocol(),
            test_set: self.title.clone(),
            test_set_sha256: self.data_sha256.clone(),
            photos: photos::provenance(run.cropper),
            left_out: self.left_out,
            config: serde_json::to_value(run.config)?,
            models,
            real_masks: real_masks.map(|(model, result)| (model.name.clone(), result.clone())).collect(),
        })
    }
}

/// Name of the setting for template comparisons.
pub(super) const TEMPLATES: &str = "1:1";

/// Returns the image on one side (0 or 1) of a pair, given the pair's number, as the model saw it, and its title.
type FaceOf<'a> = Box<dyn Fn(usize, usize) -> crate::Result<(RgbImage, String)> + 'a>;

/// Names, people and faces of the pairs of a setting.
pub(super) struct Pairs<'a> {
    /// Returns the names of the two images of pair `k`.
    pub images: Box<dyn Fn(usize) -> [String; 2] + 'a>,
    /// Returns the name of a person, given their label.
    pub person: Box<dyn Fn(u32) -> String + 'a>,
    /// Returns the faces; `None` if the pairs are not of single images.
    pub face: Option<FaceOf<'a>>,
}

/// Returns the caption of an image in a report.
pub(super) fn title(images: &dyn Dataset, image: usize) -> String {
    images.person_and_file(image).unwrap_or_else(|| images.name(image))
}

/// Checks that the score files of all models have different names.
pub(super) fn check_names(models: &[Named]) -> Result<()> {
    let mut names = BTreeMap::new();
    for named in models {
        if let Some(other) = names.insert(file_name(&named.name), &named.name) {
            bail!("expected model names that differ in letters or digits, found {other} and {}", named.name);
        }
    }
    Ok(())
}

/// Turns a model's name into a valid file name.
fn file_name(model: &str) -> String {
    let plain = model.replace(|c: char| !c.is_ascii_alphanumeric() && !"._-".contains(c), "_");
    // A leading dot would hide the file.
    match plain.trim_matches(['_', '.']) {
        "" => "model".to_owned(),
        name => name.to_owned(),
    }
}

/// Returns everything needed to reproduce the evaluation, as human-readable rows.
fn provenance(run: &Job, record: &EvaluationReport) -> Vec<(String, String)> {
    let mut lines = Vec::new();
    let mut add = |name: &str, what: String| lines.push((name.to_owned(), what));
    for named in run.models {
        add("model", named.name.clone());
        add("model file", named.file.to_string());
        add("model SHA-256", record.models[&named.name].sha256.clone());
        add("network", named.model.config().arch.title().to_owned());
        add("preprocessing", named.model.preprocessing().to_string());
    }
    add("protocol", run.protocol());
    add("test set", record.test_set.clone());
    add("test set SHA-256 (pixels and pairs)", record.test_set_sha256.clone().unwrap_or_else(|| "-".to_owned()));
    if let Some(detector) = run.cropper.opened() {
        let config = run.cropper.config();
        add("detector", detector.path().display().to_string());
        add("detector SHA-256", detector.sha256().unwrap_or("-").to_owned());
        let (score, which) = (config.detect.min_score, format!("{:?}", config.which).to_lowercase());
        add("faces of photos", format!("the {which} one, score {score} or more"));
    }
    if record.left_out.images > 0 {
        let LeftOut { images, pairs } = record.left_out;
        let of_pairs = if pairs > 0 { format!(", with {pairs} pairs") } else { String::new() };
        add("left out", format!("{images} images that cannot be used{of_pairs}"));
    }
    let eval = &run.config.eval;
    add("masks", format!("{:?} protocol, seed {}", eval.mask.protocol, eval.seed).to_lowercase());
    let bootstrap = &eval.bootstrap;
    add("bootstrap", format!("{} replicates, seed {}", bootstrap.replicates, bootstrap.seed));
    add("maskinv", format!("{} ({})", env!("CARGO_PKG_VERSION"), env!("MASKINV_COMMIT")));
    add("device", format!("{}, {} threads", run.machine, rayon::current_num_threads()));
    lines
}
