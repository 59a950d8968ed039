//! Which threshold two faces are compared at.

use anyhow::{Result, bail};
use clap::Args;

use super::tell;
use crate::models::{MaskHead, Threshold};

/// The rate where none is given, if the model has thresholds for it.
const USUAL_FMR: f64 = 1e-3;

/// Flags that choose a threshold.
#[derive(Args, Clone, Debug)]
pub(super) struct DecisionArgs {
    /// Use the model's thresholds for this false match rate, a fraction such as 0.001 [default: 0.001, or the lowest
    /// that the model has]
    #[arg(help_heading = "Decision", long, value_name = "RATE", conflicts_with = "threshold")]
    fmr: Option<f64>,
    /// Who wears a mask, instead of what the model's mask head sees
    #[arg(help_heading = "Decision", long, value_enum, value_name = "WHO", conflicts_with = "threshold")]
    setting: Option<Setting>,
    /// Lowest cosine that counts as a match, -1 to 1, overriding the model's thresholds; without either, only the
    /// cosine is printed
    #[arg(help_heading = "Decision", long, value_name = "COSINE", allow_negative_numbers = true, value_parser = cosine)]
    threshold: Option<f64>,
}

pub(super) fn cosine(text: &str) -> Result<f64, String> {
    let value = text.parse().ok().filter(|v| (-1.0..=1.0).contains(v));
    value.ok_or_else(|| "expected a number from -1 to 1".to_owned())
}

/// Who of two faces wears a mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Setting {
    /// Neither
    #[value(name = "U-U", alias = "u-u")]
    UU,
    /// One of them
    #[value(name = "U-M", aliases = ["u-m", "M-U", "m-u"])]
    UM,
    /// Both
    #[value(name = "M-M", alias = "m-m")]
    MM,
}

impl Setting {
    #[cfg(feature = "gallery")]
    pub const ALL: [Self; 3] = [Self::UU, Self::UM, Self::MM];

    /// Returns the setting of two faces by the scores of a mask head.
    pub fn of(masks: [f32; 2]) -> Self {
        match masks.map(is_worn) {
            [false, false] => Self::UU,
            [true, true] => Self::MM,
            _ => Self::UM,
        }
    }

    pub fn is_of(self, threshold: &Threshold) -> bool {
        match self {
            Self::UU => threshold.setting == "U-U",
            Self::UM => ["U-M", "M-U"].contains(&threshold.setting.as_str()),
            Self::MM => threshold.setting == "M-M",
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::UU => "U-U",
            Self::UM => "U-M",
            Self::MM => "M-M",
        }
    }
}

/// Whether a mask is worn, by the score of a mask head.
pub(super) fn is_worn(score: f32) -> bool {
    score >= MaskHead::WORN
}

/// Describes a face by the score of a mask head.
pub(super) fn describe_mask(score: f32) -> String {
    let what = if is_worn(score) { "with a mask" } else { "without a mask" };
    format!("{what} (score {score:.2})")
}

/// Returns the strictest threshold of those for a setting; if there are none, or it is not known who wears a mask, the
/// strictest of all.
pub(super) fn strictest<T>(
    all: &[T],
    seen: Option<Setting>,
    is_for: impl Fn(Setting, &T) -> bool,
    threshold: impl Fn(&T) -> f64,
) -> Option<&T> {
    let strictest = |fits: &dyn Fn(&T) -> bool| {
        all.iter().filter(|one| fits(one)).max_by(|a, b| threshold(a).total_cmp(&threshold(b)))
    };
    seen.and_then(|seen| strictest(&|one| is_for(seen, one))).or_else(|| strictest(&|_| true))
}

/// A threshold, and where it comes from.
#[derive(Clone, Debug)]
pub(super) enum Decision {
    /// Given as a flag.
    Given(f64),
    /// The model's.
    Measured(Threshold),
    /// There is none.
    None,
}

impl Decision {
    pub fn threshold(&self) -> Option<f64> {
        match self {
            Self::Given(threshold) => Some(*threshold),
            Self::Measured(measured) => Some(measured.threshold),
            Self::None => None,
        }
    }
}

impl DecisionArgs {
    /// Returns the threshold for two faces, of which `masks` are the scores of the model's mask head if it has one;
    /// `model` is the model's name.
    ///
    /// # Errors
    /// When the model has no threshold for the rate.
    pub fn choose(&self, model: &str, thresholds: &[Threshold], masks: Option<[f32; 2]>) -> Result<Decision> {
        if let Some(threshold) = self.threshold {
            return Ok(Decision::Given(threshold));
        }
        let at_rate = self.at_rate(model, thresholds)?;
        let setting = self.setting.or(masks.map(Setting::of));
        let Some(found) = strictest(&at_rate, setting, |setting, t| setting.is_of(t), |t| t.threshold) else {
            return Ok(Decision::None);
        };
        match setting {
            None if at_rate.len() > 1 => {
                let what = "no mask head says who wears a mask, so the strictest threshold is taken; see --setting";
                tell(format_args!("{model}: {what}"));
            }
            Some(setting) if !setting.is_of(found) => {
                let (setting, measured) = (setting.name(), &found.setting);
                tell(format_args!(
                    "{model}: no threshold for {setting}, so that of {measured} is taken: its rates may be others"
                ));
            }
            _ => {}
        }
        Ok(Decision::Measured((*found).clone()))
    }

    /// Returns the model's thresholds for the rate.
    fn at_rate<'a>(&self, model: &str, thresholds: &'a [Threshold]) -> Result<Vec<&'a Threshold>> {
        let of = |fmr: f64| thresholds.iter().filter(move |t| (t.fmr - fmr).abs() <= 1e-9 * fmr).collect::<Vec<_>>();
        let lowest = || thresholds.iter().map(|t| t.fmr).min_by(f64::total_cmp);
        let fmr = match self.fmr {
            Some(fmr) => fmr,
            None if !of(USUAL_FMR).is_empty() => USUAL_FMR,
            None => lowest().unwrap_or(USUAL_FMR),
        };
        let found = of(fmr);
        if found.is_empty() && self.fmr.is_some() {
            let mut rates: Vec<f64> = thresholds.iter().map(|t| t.fmr).collect();
            rates.sort_by(|a, b| b.total_cmp(a));
            rates.dedup();
            let rates: Vec<String> = rates.iter().map(f64::to_string).collect();
            let rates = if rates.is_empty() { "none".to_owned() } else { format!("those for {}", rates.join(", ")) };
            bail!("{model}: expected a threshold for FMR {fmr}, found {rates}; see maskinv calibrate");
        }
        Ok(found)
    }
}
