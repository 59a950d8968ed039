//! `maskinv evaluate`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;

use super::bootstrap::BootstrapArgs;
use super::model::HubArgs;
use super::progress::Progress;
use super::settings::SettingsArgs;
use super::{print, print_json};
use crate::data::TestSet;
use crate::eval::{
    Comparisons, Evaluation, Figures, SettingResult, compare, compare_as_is, details, figures, table, table_as_is,
    write_scores,
};
use crate::machine::Machine;
use crate::train::{Config, Event};

/// What to measure, and on what.
#[derive(Args, Debug)]
pub struct EvaluateArgs {
    /// Checkpoints in any format (see `maskinv info`), folders of trainings, hf://owner/repo/file or short names
    #[arg(required = true, value_name = "MODEL")]
    models: Vec<String>,
    #[command(flatten)]
    settings: SettingsArgs,
    #[command(flatten)]
    hub: HubArgs,
    /// A list of pairs of images in --data, in LFW's or MFR2's format
    #[arg(long, value_name = "FILE")]
    pairs: Option<PathBuf>,
    /// Decides the masks that test images wear
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Writes every score into this folder, a CSV for each model and setting, that `maskinv metrics` reads
    #[arg(long, value_name = "DIR")]
    scores: Option<PathBuf>,
    #[command(flatten)]
    bootstrap: BootstrapArgs,
    /// Prints all figures as JSON
    #[arg(long)]
    json: bool,
}

impl EvaluateArgs {
    /// Evaluates each model and prints a table.
    ///
    /// # Errors
    /// When a checkpoint, setting or image is wrong.
    pub fn run(self) -> Result<()> {
        self.settings.threads.start()?;
        let machine = self.settings.device.open()?;
        let load = |name: &String| Ok((name.clone(), self.hub.load_with_notes(name)?.model.on(&machine)));
        let models = self.models.iter().map(load);
        let models = models.collect::<Result<Vec<_>>>()?;
        let mut config = self.base_settings()?;
        if let Some(pairs) = &self.pairs {
            config.data.pairs = Some(pairs.clone());
        }
        if let Some(seed) = self.seed {
            config.eval.seed = seed;
        }
        self.bootstrap.apply(&mut config.eval.bootstrap);
        self.settings.apply(&mut config, &self.hub)?;
        let test = config.data.open_test()?;
        let photos = config.data.open_real_masks()?;
        let mut progress = Progress::new();
        let (mut evaluations, mut real_masks) = (Vec::new(), Vec::new());
        for (name, model) in &models {
            let mut on = |done, total| progress.show(Event::Embedded { done, total });
            let scores = compare(model, &test, &config.eval, &mut on).context(name.clone())?;
            for (setting, comparisons) in &scores {
                self.write(name, setting.name(), &test, comparisons)?;
            }
            evaluations.push((name.as_str(), figures(&scores, &test, &config.eval).context(name.clone())?));
            if let Some(photos) = &photos {
                let comparisons = compare_as_is(model, photos, &config.eval, on).context(name.clone())?;
                self.write(name, "real-masks", photos, &comparisons)?;
                let result = Figures::new(&comparisons, photos.num_folds, &config.eval.bootstrap)
                    .and_then(|figures| figures.compute(None))
                    .context(name.clone())?;
                real_masks.push((name.as_str(), result));
            }
        }
        if self.json {
            return print_json(&record(&config, &machine, &test.description, &evaluations, &real_masks));
        }
        print(&format!("{}:\n", test.description))?;
        let rows: Vec<(&str, &Evaluation)> = evaluations.iter().map(|(name, e)| (*name, e)).collect();
        print(&table(&rows))?;
        if let Some(photos) = &photos {
            let rows: Vec<(&str, &SettingResult)> = real_masks.iter().map(|(name, r)| (*name, r)).collect();
            print(&format!("\n{}:\n\n{}", photos.description, table_as_is("real masks", &rows)))?;
        }
        for (name, evaluation) in &evaluations {
            print(&format!("\n{name}:\n{}", details(evaluation)))?;
        }
        Ok(())
    }

    /// Keeps the scores of a model in one setting, if that is asked for.
    fn write(&self, model: &str, setting: &str, test: &TestSet, comparisons: &Comparisons) -> Result<()> {
        let Some(folder) = &self.scores else { return Ok(()) };
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let model = model.replace(|c: char| !c.is_ascii_alphanumeric() && !"._-".contains(c), "_");
        let images = |i: usize| [test.pairs[i].a, test.pairs[i].b].map(|image| test.images.name(image));
        let person = |label| test.images.identity_name(label);
        write_scores(&folder.join(format!("{}-{setting}.csv", model.trim_matches('_'))), comparisons, images, person)?;
        Ok(())
    }

    /// What was asked for, or what the first model was trained with: its people were kept apart from the test's.
    fn base_settings(&self) -> Result<Config> {
        if let Some(config) = self.settings.chosen()? {
            return Ok(config);
        }
        // runs/NAME/ARM, or a file in it.
        let beside =
            self.models.iter().take(1).flat_map(|m| Path::new(m).ancestors().take(3)).map(|p| p.join("config.toml"));
        match beside.into_iter().find(|p| p.is_file()) {
            Some(path) => {
                eprintln!("settings of {}", path.display());
                Ok(Config::read(&path)?)
            }
            None => {
                eprintln!("{}: no config.toml beside it; default settings", self.models[0]);
                Ok(Config::default())
            }
        }
    }
}

/// The figures with what is needed to repeat them.
fn record(
    config: &Config,
    machine: &Machine,
    test_set: &str,
    evaluations: &[(&str, Evaluation)],
    real_masks: &[(&str, SettingResult)],
) -> serde_json::Value {
    serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"),
        "commit": env!("MASKINV_COMMIT"),
        "device": machine.to_string(),
        "threads": rayon::current_num_threads(),
        "test_set": test_set,
        "config": config,
        "models": evaluations.iter().map(|(name, e)| (name.to_string(), serde_json::json!(e)))
            .collect::<serde_json::Map<_, _>>(),
        "real_masks": real_masks.iter().map(|(name, r)| (name.to_string(), serde_json::json!(r)))
            .collect::<serde_json::Map<_, _>>(),
    })
}
