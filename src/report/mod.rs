//! Reports. An evaluation gets a folder with `report.json` for machines, `report.md`, and `report.html`, a
//! self-contained page; a training gets such a page alone.

mod axis;
mod curve_plot;
mod document;
mod faces;
mod figures;
mod json;
mod markdown;
mod page;
mod plot;
mod probit;
mod training;

use std::path::Path;

pub use faces::{FacePair, Hardest};
pub use json::{EvaluationReport, LeftOut, ModelReport, REAL_MASKS, REPORT_FILE, ReportFile};
pub use training::{ArmCurves, SampleRow, TrainingReport};

use crate::error::{Error, Result};
use crate::eval::{Histogram, Identification, OperatingPoint, Scores, SettingResult};
use crate::files::write_atomic;

/// Name of the page's file.
pub const PAGE_FILE: &str = "report.html";
/// File name of the report as Markdown.
const MARKDOWN_FILE: &str = "report.md";

/// Contents of the report of an evaluation.
#[derive(Debug)]
pub struct Report {
    /// Human-readable description of the pairs and where they are from.
    pub title: String,
    /// The figures, with everything needed to reproduce them.
    pub record: EvaluationReport,
    /// Human-readable provenance: (name, value) rows.
    pub provenance: Vec<(String, String)>,
    /// Results, one for each model and set of comparisons.
    pub measured: Vec<Measured>,
    /// Results of searches, one for each model and gallery.
    pub searched: Vec<Searched>,
    /// Confidence level of the intervals.
    pub confidence: f64,
}

/// Results of one model on one set of comparisons.
#[derive(Debug)]
pub struct Measured {
    /// The model's name.
    pub model: String,
    /// Name of the setting, such as `U-M`.
    pub setting: String,
    /// The metrics.
    pub result: SettingResult,
    /// The points of the ROC and DET curves.
    pub curve: Vec<OperatingPoint>,
    /// Histogram of the scores.
    pub histogram: Histogram,
    /// The pairs that the model gets most wrong; `None` unless requested.
    pub hardest: Option<Hardest>,
    /// Name of the score file, relative to the folder of the report, if scores are kept.
    pub scores: Option<String>,
}

/// Results of the searches by one model in one gallery.
#[derive(Debug)]
pub struct Searched {
    /// The model's name.
    pub model: String,
    /// The gallery's name.
    pub gallery: String,
    /// The metrics.
    pub result: Identification,
}

impl Measured {
    /// Returns results with the curve and the histogram of `scores`.
    pub fn new(model: &str, setting: &str, result: SettingResult, scores: &Scores) -> Self {
        Self {
            model: model.to_owned(),
            setting: setting.to_owned(),
            result,
            curve: scores.operating_points(),
            histogram: scores.histogram(),
            hardest: None,
            scores: None,
        }
    }
}

impl Report {
    /// Writes the three files into `folder`, the page last.
    ///
    /// # Errors
    /// When the folder already has a report or cannot be written to, or a curve cannot be drawn.
    pub fn write(&self, folder: &Path) -> Result<()> {
        refuse_to_replace(folder)?;
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let page = page::page(self)?;
        write_atomic(&folder.join(REPORT_FILE), json::json(self)?.as_bytes())?;
        write_atomic(&folder.join(MARKDOWN_FILE), markdown::markdown(self).as_bytes())?;
        write_atomic(&folder.join(PAGE_FILE), page.as_bytes())
    }

    /// Names of the models, in the order in which they were measured.
    fn models(&self) -> Vec<&str> {
        let mut models: Vec<&str> = Vec::new();
        for model in self.measured.iter().map(|m| &m.model).chain(self.searched.iter().map(|s| &s.model)) {
            if !models.contains(&model.as_str()) {
                models.push(model);
            }
        }
        models
    }

    /// Results of `model`.
    fn of<'a>(&'a self, model: &'a str) -> impl Iterator<Item = &'a Measured> {
        self.measured.iter().filter(move |m| m.model == model)
    }
}

/// Checks that a folder has no report; other files may be in it.
///
/// # Errors
/// When it has one.
pub fn refuse_to_replace(folder: &Path) -> Result<()> {
    // The page of a training has the same name.
    for path in [REPORT_FILE, PAGE_FILE, MARKDOWN_FILE].map(|name| folder.join(name)) {
        if path.exists() {
            return Err(Error::Io { source: std::io::Error::other("a report already exists"), path });
        }
    }
    Ok(())
}
