//! What an evaluation found, as a folder to keep and to show: `report.json` for machines, `report.md`, and `report.html`, one page that
//! needs nothing else; and how a training went, as such a page.

mod axis;
mod curve_plot;
mod document;
mod faces;
mod json;
mod markdown;
mod page;
mod plot;
mod probit;
mod training;

use std::path::Path;

use serde_json::Value;

pub use faces::{FacePair, Hardest};
pub use json::{REAL_MASKS, REPORT_FILE, ReportFile};
pub use training::{ArmCurves, EvaluationPoint, FIGURES, SampleRow, StepPoint, TrainingReport};

use crate::error::{Error, Result};
use crate::eval::{Histogram, Identification, OperatingPoint, Scores, SettingResult};
use crate::files::write_atomic;

/// The page.
const PAGE_FILE: &str = "report.html";

/// Everything that a report says.
#[derive(Debug)]
pub struct Report {
    /// What the pairs are and where they are from, for people.
    pub title: String,
    /// What is needed to repeat it, for machines.
    pub record: Value,
    /// The same for people: a name and what it is.
    pub provenance: Vec<(String, String)>,
    /// One for each model and set of comparisons.
    pub measured: Vec<Measured>,
    /// One for each model and gallery.
    pub searched: Vec<Searched>,
    /// Share of the draws that an interval holds.
    pub confidence: f64,
}

/// One set of comparisons by one model.
#[derive(Debug)]
pub struct Measured {
    /// The model's name.
    pub model: String,
    /// What was compared, such as `U-M`.
    pub setting: String,
    /// The figures.
    pub result: SettingResult,
    /// The points of the ROC and DET curves.
    pub curve: Vec<OperatingPoint>,
    /// How scores are spread.
    pub histogram: Histogram,
    /// The pairs with the least fitting scores; none unless asked for.
    pub hardest: Option<Hardest>,
    /// The file of all scores in the folder of the report, if they are kept.
    pub scores: Option<String>,
}

/// The searches by one model in one gallery.
#[derive(Debug)]
pub struct Searched {
    /// The model's name.
    pub model: String,
    /// The gallery's.
    pub gallery: String,
    /// The figures.
    pub result: Identification,
}

impl Measured {
    /// Takes from `scores` what is drawn of them.
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
    /// When the folder has a report already, cannot be written to, or a curve cannot be drawn.
    pub fn write(&self, folder: &Path) -> Result<()> {
        refuse_to_replace(folder)?;
        let page = page::page(self)?;
        write_atomic(&folder.join(REPORT_FILE), json::json(self)?.as_bytes())?;
        write_atomic(&folder.join("report.md"), markdown::markdown(self).as_bytes())?;
        write_atomic(&folder.join(PAGE_FILE), page.as_bytes())
    }

    /// The models, in their order.
    fn models(&self) -> Vec<&str> {
        let mut models: Vec<&str> = Vec::new();
        for model in self.measured.iter().map(|m| &m.model).chain(self.searched.iter().map(|s| &s.model)) {
            if !models.contains(&model.as_str()) {
                models.push(model);
            }
        }
        models
    }

    /// What `model` was measured in.
    fn of<'a>(&'a self, model: &'a str) -> impl Iterator<Item = &'a Measured> {
        self.measured.iter().filter(move |m| m.model == model)
    }
}

/// Makes the folder of a report, which may have other files.
///
/// # Errors
/// When there is a report in it, or it cannot be made.
pub fn refuse_to_replace(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    // The page of a training has the same name.
    for path in [REPORT_FILE, PAGE_FILE].map(|name| folder.join(name)) {
        if path.exists() {
            return Err(Error::Io { source: std::io::Error::other("there is a report already"), path });
        }
    }
    Ok(())
}
