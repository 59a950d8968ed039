//! `maskinv evaluate`.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;

use super::progress::Progress;
use super::settings::SettingsArgs;
use super::{print, print_json};
use crate::eval::{Evaluation, details, evaluate, table};
use crate::train::{Config, Event, load_backbone};

/// What to measure, and on what.
#[derive(Args, Debug)]
pub struct EvaluateArgs {
    /// Checkpoints, or their folders
    #[arg(required = true, value_name = "MODEL")]
    models: Vec<PathBuf>,
    #[command(flatten)]
    settings: SettingsArgs,
    /// A list of pairs of images in --data, in LFW's or MFR2's format
    #[arg(long, value_name = "FILE")]
    pairs: Option<PathBuf>,
    /// Decides the masks that test images wear
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
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
        self.settings.use_threads()?;
        let models = self.models.iter().map(|path| Ok((path.display().to_string(), load_backbone(path)?)));
        let models = models.collect::<Result<Vec<_>>>()?;
        let mut config = self.base_settings()?;
        if let Some(pairs) = &self.pairs {
            config.data.pairs = Some(pairs.clone());
        }
        if let Some(seed) = self.seed {
            config.eval.seed = seed;
        }
        self.settings.apply(&mut config)?;
        let test = config.data.open_test()?;
        let mut progress = Progress::new();
        let mut evaluations = Vec::new();
        for (name, model) in &models {
            let on = |done, total| progress.show(Event::Embedded { done, total });
            evaluations.push((name.as_str(), evaluate(model, &test, &config.eval, on).context(name.clone())?));
        }
        if self.json {
            return print_json(&record(&config, &test.description, &evaluations));
        }
        print(&format!("{}:\n", test.description))?;
        let rows: Vec<(&str, &Evaluation)> = evaluations.iter().map(|(name, e)| (*name, e)).collect();
        print(&table(&rows))?;
        for (name, evaluation) in &evaluations {
            print(&format!("\n{name}:\n{}", details(evaluation)))?;
        }
        Ok(())
    }

    /// What was asked for, or what the first model was trained with: its people were kept apart from the test's.
    fn base_settings(&self) -> Result<Config> {
        if let Some(config) = self.settings.chosen()? {
            return Ok(config);
        }
        // runs/NAME/ARM, or a file in it.
        let beside = self.models.iter().take(1).flat_map(|m| m.ancestors().take(3)).map(|p| p.join("config.toml"));
        match beside.into_iter().find(|p| p.is_file()) {
            Some(path) => {
                eprintln!("settings of {}", path.display());
                Ok(Config::read(&path)?)
            }
            None => bail!("{}: no config.toml beside it; say --config or --preset", self.models[0].display()),
        }
    }
}

/// The figures with what is needed to repeat them.
fn record(config: &Config, test_set: &str, evaluations: &[(&str, Evaluation)]) -> serde_json::Value {
    serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"),
        "commit": env!("MASKINV_COMMIT"),
        "device": "cpu",
        "threads": rayon::current_num_threads(),
        "test_set": test_set,
        "config": config,
        "models": evaluations.iter().map(|(name, e)| (name.to_string(), serde_json::json!(e)))
            .collect::<serde_json::Map<_, _>>(),
    })
}
