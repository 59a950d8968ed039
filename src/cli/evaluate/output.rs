//! What was measured, onto the terminal, into JSON and into a report.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use image::RgbImage;
use serde_json::{Map, Value, json};

use super::{Named, Protocol, Run};
use crate::cli::{print, print_json};
use crate::data::Dataset;
use crate::eval::{Evaluation, Figures, SettingResult, write_scores};
use crate::eval::{details, identification_table, operating_points, table, table_as_is};
use crate::files::sha256;
use crate::report::{Hardest, Measured, Report, Searched};

/// What a protocol measured.
#[derive(Default)]
pub(super) struct Output {
    /// What was compared, for people.
    pub title: String,
    /// SHA-256 of the images and of what was done with them.
    pub data_sha256: Option<String>,
    /// Figures by setting, for the models in their order.
    pub evaluations: Vec<Evaluation>,
    /// What `real_masks` below is of.
    pub real_masks_title: String,
    /// Figures of photos as they are.
    pub real_masks: Vec<SettingResult>,
    /// Everything that a report draws.
    pub measured: Vec<Measured>,
    pub searched: Vec<Searched>,
    /// Further lines for people, a model each.
    pub notes: Vec<String>,
}

impl Output {
    /// Keeps the scores of a model in one setting, if that is asked for, and what a report draws of them.
    pub fn take(
        &mut self,
        run: &Run,
        model: &str,
        setting: &str,
        figures: &Figures,
        result: SettingResult,
        pairs: &Pairs,
    ) -> Result<()> {
        let comparisons = figures.comparisons();
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

    /// Prints the figures, and writes the report if one is asked for.
    pub fn finish(self, run: &Run) -> Result<()> {
        let record = self.record(run)?;
        let text = self.text(run)?;
        if run.args.json {
            print_json(&record)?;
        } else {
            print(&text)?;
        }
        let Some(folder) = &run.args.report else { return Ok(()) };
        let provenance = provenance(run, &record);
        let confidence = run.config.eval.bootstrap.confidence;
        let Self { title, measured, searched, .. } = self;
        Report { title, record, provenance, measured, searched, confidence }.write(folder)?;
        eprintln!("{}", folder.join("report.html").display());
        Ok(())
    }

    fn text(&self, run: &Run) -> Result<String> {
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
        // Where there are impostors enough for low rates.
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

    /// The figures with what is needed to repeat them.
    fn record(&self, run: &Run) -> Result<Value> {
        let mut models = Map::new();
        for (i, named) in run.models.iter().enumerate() {
            let mut model = json!({
                "file": named.file,
                "sha256": sha256(&named.file)?,
                "network": named.model.config(),
                "preprocessing": named.model.preprocessing(),
            });
            let of_model = self.measured.iter().filter(|m| m.model == named.name);
            model["settings"] = match self.evaluations.get(i) {
                Some(evaluation) => json!(evaluation.settings),
                None => of_model.map(|m| (m.setting.clone(), json!(m.result))).collect::<Map<_, _>>().into(),
            };
            let galleries = self.searched.iter().filter(|s| s.model == named.name);
            let galleries: Map<_, _> = galleries.map(|s| (s.gallery.clone(), json!(s.result))).collect();
            if !galleries.is_empty() {
                model["galleries"] = galleries.into();
            }
            models.insert(named.name.clone(), model);
        }
        let real_masks = run.models.iter().zip(&self.real_masks);
        Ok(json!({
            "version": env!("CARGO_PKG_VERSION"),
            "commit": env!("MASKINV_COMMIT"),
            "device": run.machine.to_string(),
            "threads": rayon::current_num_threads(),
            "protocol": run.protocol(),
            "test_set": self.title,
            "test_set_sha256": self.data_sha256,
            "config": run.config,
            "models": models,
            "real_masks": real_masks.map(|(m, r)| (m.name.clone(), json!(r))).collect::<Map<_, _>>(),
        }))
    }
}

/// The setting of comparisons of templates.
pub(super) const TEMPLATES: &str = "1:1";

/// Returns an image of a pair, by the pair's number and its side, 0 or 1, as a model saw it, and what it is called.
type FaceOf<'a> = Box<dyn Fn(usize, usize) -> crate::Result<(RgbImage, String)> + 'a>;

/// Whose and which images the pairs of a setting are.
pub(super) struct Pairs<'a> {
    /// The two images of pair `k`.
    pub images: Box<dyn Fn(usize) -> [String; 2] + 'a>,
    /// Who a number is.
    pub person: Box<dyn Fn(u32) -> String + 'a>,
    /// Their faces; none where pairs are not of images.
    pub face: Option<FaceOf<'a>>,
}

/// What is written below an image in a report.
pub(super) fn title(images: &dyn Dataset, image: usize) -> String {
    images.person_and_file(image).unwrap_or_else(|| images.name(image))
}

/// Checks that no model's files would be another's.
pub(super) fn check_names(models: &[Named]) -> Result<()> {
    let mut names = BTreeMap::new();
    for named in models {
        if let Some(other) = names.insert(file_name(&named.name), &named.name) {
            bail!("expected models with names that differ in letters or digits, found {other} and {}", named.name);
        }
    }
    Ok(())
}

/// A name that can be a file's.
fn file_name(model: &str) -> String {
    let plain = model.replace(|c: char| !c.is_ascii_alphanumeric() && !"._-".contains(c), "_");
    plain.trim_matches('_').to_owned()
}

/// What is needed to repeat the evaluation, for people.
fn provenance(run: &Run, record: &Value) -> Vec<(String, String)> {
    let mut lines = Vec::new();
    let mut add = |name: &str, what: String| lines.push((name.to_owned(), what));
    for named in run.models {
        let model = &record["models"][&named.name];
        add("model", named.name.clone());
        add("its file", named.file.display().to_string());
        add("its SHA-256", model["sha256"].as_str().unwrap_or_default().to_owned());
        add("its network", named.model.config().arch.title().to_owned());
        add("its preprocessing", named.model.preprocessing().to_string());
    }
    add("protocol", run.protocol());
    add("test set", record["test_set"].as_str().unwrap_or_default().to_owned());
    add("SHA-256 of its pixels and pairs", record["test_set_sha256"].as_str().unwrap_or("-").to_owned());
    let eval = &run.config.eval;
    add("masks", format!("{:?} protocol, seed {}", eval.mask.protocol, eval.seed).to_lowercase());
    let bootstrap = &eval.bootstrap;
    add("intervals", format!("{} draws, seed {}", bootstrap.replicates, bootstrap.seed));
    add("maskinv", format!("{} ({})", env!("CARGO_PKG_VERSION"), env!("MASKINV_COMMIT")));
    add("device", format!("{}, {} threads", run.machine, rayon::current_num_threads()));
    lines
}
