//! Writes `report.json`, and reads it back for comparisons.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Report;
use crate::error::{Error, Result};
use crate::eval::{Histogram, Identification, OperatingPoint, SettingResult};
use crate::files::folder_of;
use crate::models::ModelConfig;
use crate::preprocessing::Preprocessing;

/// Name of the file in the folder of a report.
pub const REPORT_FILE: &str = "report.json";

/// Setting of photos of people with real masks, compared as they are.
pub const REAL_MASKS: &str = "real-masks";

/// Figures of an evaluation, with everything needed to reproduce them.
#[derive(Clone, Debug, Serialize)]
pub struct EvaluationReport {
    /// Version of this crate.
    pub version: &'static str,
    /// Commit that the crate was built from.
    pub commit: &'static str,
    /// Machine that the networks ran on.
    pub device: String,
    /// Number of worker threads.
    pub threads: usize,
    /// Name of the protocol.
    pub protocol: String,
    /// Description of the pairs and where they are from.
    pub test_set: String,
    /// SHA-256 of the test set's images and pairs, if it was computed.
    pub test_set_sha256: Option<String>,
    /// How faces were found in photos, with the detector's SHA-256; null if all images were aligned crops.
    pub photos: Value,
    /// What was not compared.
    pub left_out: LeftOut,
    /// All settings, as the program that made the report has them.
    pub config: Value,
    /// The models by name.
    pub models: BTreeMap<String, ModelReport>,
    /// Figures of each model on photos of people with real masks.
    pub real_masks: BTreeMap<String, SettingResult>,
}

/// Images that could not be read or have no face, and were left out at the user's wish: failures to acquire, which
/// error rates do not count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LeftOut {
    /// Number of images.
    pub images: usize,
    /// Number of listed pairs with such an image.
    pub pairs: usize,
}

/// A model and its figures.
#[derive(Clone, Debug, Serialize)]
pub struct ModelReport {
    /// File that it was loaded from.
    pub file: String,
    /// SHA-256 of the file.
    pub sha256: String,
    /// The network.
    pub network: ModelConfig,
    /// Preprocessing of its input.
    pub preprocessing: Preprocessing,
    /// Figures by setting.
    pub settings: BTreeMap<String, SettingResult>,
    /// Figures of searches by gallery.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub galleries: BTreeMap<String, Identification>,
}

/// What `report.json` holds.
#[derive(Serialize)]
struct Written<'a> {
    #[serde(flatten)]
    report: &'a EvaluationReport,
    curves: BTreeMap<&'a str, BTreeMap<&'a str, Drawn<'a>>>,
    /// Names of the models, in the order in which they were measured.
    order: Vec<&'a str>,
}

/// Curves of a model in a setting.
#[derive(Serialize)]
struct Drawn<'a> {
    curve: &'a [OperatingPoint],
    histogram: &'a Histogram,
    /// Name of the score file.
    scores: Option<&'a str>,
}

/// Returns the contents of `report.json`.
pub(super) fn json(report: &Report) -> Result<String> {
    let of_model = |model| {
        let curves = report.of(model).map(|m| {
            let drawn = Drawn { curve: &m.curve, histogram: &m.histogram, scores: m.scores.as_deref() };
            (m.setting.as_str(), drawn)
        });
        (model, curves.collect())
    };
    let order = report.models();
    let curves = order.iter().map(|model| of_model(*model)).collect();
    let written = Written { report: &report.record, curves, order };
    serde_json::to_string_pretty(&written).map_err(|e| Error::Evaluation(e.to_string()))
}

/// Part of a report that comparisons need.
#[derive(Debug, Deserialize)]
pub struct ReportFile {
    /// Folder of the report, to which the names of score files are relative.
    #[serde(skip)]
    folder: PathBuf,
    /// Names of the models, in the order in which they were measured.
    order: Vec<String>,
    models: BTreeMap<String, ModelFigures>,
    #[serde(default)]
    test_set_sha256: Option<String>,
    /// All settings of the evaluation.
    #[serde(default)]
    config: Value,
    #[serde(default)]
    real_masks: BTreeMap<String, Value>,
    #[serde(default)]
    curves: BTreeMap<String, BTreeMap<String, Kept>>,
}

#[derive(Debug, Deserialize)]
struct ModelFigures {
    settings: BTreeMap<String, Value>,
}

#[derive(Debug, Deserialize)]
struct Kept {
    scores: Option<String>,
}

impl ReportFile {
    /// Reads a report, given its folder or its file.
    ///
    /// # Errors
    /// When the file cannot be read or is not a report.
    pub fn read(path: &Path) -> Result<Self> {
        let path = if path.is_dir() { path.join(REPORT_FILE) } else { path.to_owned() };
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        let mut report: Self = serde_json::from_str(&text).map_err(|e| Error::Format {
            what: format!("line {}: expected a report of maskinv evaluate: {e}", e.line()),
            offset: 0,
            path: path.clone(),
        })?;
        for (model, figures) in std::mem::take(&mut report.real_masks) {
            if let Some(model) = report.models.get_mut(&model) {
                model.settings.insert(REAL_MASKS.to_owned(), figures);
            }
        }
        Ok(Self { folder: folder_of(&path).to_owned(), ..report })
    }

    /// Every model with every setting that it was measured in.
    pub fn measured(&self) -> impl Iterator<Item = (&str, &str)> {
        let named = self.order.iter().filter_map(|name| self.models.get_key_value(name));
        named.flat_map(|(model, f)| f.settings.keys().map(move |setting| (model.as_str(), setting.as_str())))
    }

    /// Returns the SHA-256 of the test set's images and pairs, if the report has it.
    pub fn test_set_sha256(&self) -> Option<&str> {
        self.test_set_sha256.as_deref()
    }

    /// Returns the settings that decide which mask each image gets, by their names, as far as the report has them.
    pub fn drawn_masks(&self) -> BTreeMap<String, &Value> {
        let Some(settings) = self.config.get("eval").and_then(Value::as_object) else { return BTreeMap::new() };
        let mut found = BTreeMap::new();
        for name in ["seed", "reference_colours_um", "reference_colours_mm"] {
            found.extend(settings.get(name).map(|value| (format!("eval.{name}"), value)));
        }
        let of_mask = settings.get("mask").and_then(Value::as_object).into_iter().flatten();
        found.extend(of_mask.map(|(name, value)| (format!("eval.mask.{name}"), value)));
        found
    }

    /// Returns a metric, such as `eer`; `None` if the model was not measured in the setting or has no such metric.
    pub fn figure(&self, model: &str, setting: &str, figure: &str) -> Option<f64> {
        self.models.get(model)?.settings.get(setting)?.get(figure)?.as_f64()
    }

    /// Returns the path of the score file, if the report names one and it exists.
    pub fn scores(&self, model: &str, setting: &str) -> Option<PathBuf> {
        let name = self.curves.get(model)?.get(setting)?.scores.as_ref()?;
        Some(self.folder.join(name)).filter(|path| path.is_file())
    }
}
