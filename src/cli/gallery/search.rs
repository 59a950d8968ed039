//! `maskinv search`.

use std::path::Path;

use anyhow::Result;
use serde_json::json;

use super::faces::{BATCH, Embedded, Tools};
use super::{ColumnArg, PoolArg, SearchArgs};
use crate::cli::decision::{Setting, describe_mask, strictest};
use crate::cli::photos::read_crop;
use crate::cli::progress::Progress;
use crate::cli::{list_images, print, print_json, tell};
use crate::gallery::{Candidate, ColumnKind, Finder, Gallery, Pool};
use crate::models::Threshold;

/// Lists the people of the highest scores for each face, with a decision.
pub(super) fn run(args: &SearchArgs) -> Result<()> {
    let gallery = Gallery::open(&args.gallery)?;
    let mut paths = Vec::new();
    for image in &args.images {
        paths.extend(list_images(image)?);
    }
    let mut tools = Tools::open(&args.common, Some(&gallery))?;
    gallery.check_model(&tools.gallery_model()?)?;
    if let Some(note) = tools.model.drop_stale()? {
        tell(format_args!("{}: {note}", tools.name));
    }
    let kind = match args.column {
        ColumnArg::F32 => ColumnKind::F32,
        ColumnArg::F16 => ColumnKind::F16,
        ColumnArg::Int8 => ColumnKind::Int8,
    };
    let pool = match args.pool {
        PoolArg::Best => Pool::Best,
        PoolArg::Mean => Pool::Mean,
    };
    let finder = Finder::new(&gallery, kind, pool)?;
    let decision = OpenSet::new(args, tools.model.thresholds(), finder.num_rows(), &tools.name);
    let (mut progress, total, mut unusable, mut records) = (Progress::new(), paths.len(), Vec::new(), Vec::new());
    for (first, batch) in (0..).step_by(BATCH).zip(paths.chunks(BATCH)) {
        let (embedded, failed) = tools.embed(batch.len(), |i| read_crop(&tools.cropper, &batch[i]))?;
        unusable.extend(failed.into_iter().map(|(i, error)| (first + i, error)));
        let queries: Vec<f32> = embedded.iter().flat_map(|face| &face.embedding).copied().collect();
        let above = |k: usize, enrolled: Option<f32>| {
            decision.choose(embedded[k].mask, enrolled).map_or(0.0, |chosen| chosen.threshold)
        };
        let found = finder.search_above(&queries, args.top.into(), &above)?;
        for (face, candidates) in embedded.iter().zip(found) {
            let judge = |candidate: Candidate| {
                let enrolled = candidate.face.mask.filter(|_| pool == Pool::Best);
                Judged { chosen: decision.choose(face.mask, enrolled), candidate }
            };
            let judged: Vec<Judged> = candidates.into_iter().map(judge).collect();
            match args.json {
                true => records.push(record(&batch[face.image], face, &judged)),
                false => show(&batch[face.image], face, &judged)?,
            }
        }
        if !unusable.is_empty() && !args.unusable.are_left_out() {
            break;
        }
        if total > BATCH {
            progress.count("search", "photos", (first + BATCH).min(total), total);
        }
    }
    if args.json {
        print_json(&records)?;
    }
    args.unusable.tell(unusable, total)
}

/// A candidate with the threshold for it.
struct Judged {
    candidate: Candidate,
    chosen: Option<Chosen>,
}

impl Judged {
    fn is_match(&self) -> Option<bool> {
        self.chosen.map(|chosen| self.candidate.score >= chosen.threshold)
    }
}

/// A threshold, and what it is for.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Chosen {
    threshold: f64,
    /// Setting that it was calibrated for; none if it was given.
    calibrated: Option<Setting>,
    /// Who wears a mask; none if that is not known.
    seen: Option<Setting>,
}

impl Chosen {
    /// Describes the threshold's setting, and the one seen if it is another.
    fn describe(&self) -> String {
        match (self.calibrated, self.seen) {
            (None, _) => String::new(),
            (Some(calibrated), Some(seen)) if calibrated == seen => format!(" for {}", seen.name()),
            (Some(calibrated), Some(seen)) => format!(" for {}, {} has none", calibrated.name(), seen.name()),
            (Some(calibrated), None) => format!(" for {}, the strictest", calibrated.name()),
        }
    }
}

/// Thresholds for a search among many faces.
struct OpenSet<'a> {
    args: &'a SearchArgs,
    /// Thresholds by setting.
    at: Vec<(Setting, f64)>,
}

impl<'a> OpenSet<'a> {
    /// Chooses the thresholds for the rate at which strangers may be taken for somebody: each of the `num` faces that
    /// they are compared with is one more chance of a false match.
    fn new(args: &'a SearchArgs, thresholds: &[Threshold], num: usize, model: &str) -> Self {
        let fmr = fmr_for(args.fpir, num);
        let mut at = Vec::new();
        for setting in Setting::ALL {
            let of_setting: Vec<&Threshold> = thresholds.iter().filter(|t| setting.is_of(t)).collect();
            let Some((threshold, reached)) = at_fmr(&of_setting, fmr) else { continue };
            if reached > fmr * 1.000_001 && args.threshold.is_none() {
                let fpir = fpir_for(reached, num);
                tell(format_args!(
                    "{model}: FPIR {} among {num} faces needs a false match rate of {fmr:.1e} in {}, and the lowest \
                     calibrated is {reached:.1e}: up to {:.1} % of strangers may match",
                    args.fpir,
                    setting.name(),
                    100.0 * fpir
                ));
            }
            at.push((setting, threshold));
        }
        if args.threshold.is_none() {
            if at.is_empty() {
                tell(format_args!(
                    "{model}: no thresholds, so only scores are shown; see maskinv calibrate --all-pairs"
                ));
            } else if args.pool == PoolArg::Mean {
                tell(format_args!("{model}: the thresholds are for single faces; for means the rates may be others"));
            }
        }
        Self { args, at }
    }

    /// Returns the threshold for a face and one of the gallery by the scores of the mask head; none without thresholds.
    fn choose(&self, probe: Option<f32>, enrolled: Option<f32>) -> Option<Chosen> {
        let masks = probe.zip(enrolled).map(|(probe, enrolled)| [probe, enrolled]);
        let seen = self.args.setting.or(masks.map(Setting::of));
        if let Some(threshold) = self.args.threshold {
            return Some(Chosen { threshold, calibrated: None, seen });
        }
        let found = strictest(&self.at, seen, |seen, (setting, _)| seen == *setting, |(_, threshold)| *threshold);
        found.map(|&(setting, threshold)| Chosen { threshold, calibrated: Some(setting), seen })
    }
}

/// Returns the false match rate at which a stranger matches one of `num` faces with probability `fpir`, if matches with
/// each are independent.
fn fmr_for(fpir: f64, num: usize) -> f64 {
    -f64::exp_m1(f64::ln_1p(-fpir) / num.max(1) as f64)
}

/// Inverse of [`fmr_for`].
fn fpir_for(fmr: f64, num: usize) -> f64 {
    -f64::exp_m1(f64::ln_1p(-fmr) * num as f64)
}

/// Returns the threshold for a false match rate, between those that were measured linear in the rate's logarithm, and
/// the rate that it is for: the nearest measured one where the wanted one is beyond them.
fn at_fmr(thresholds: &[&Threshold], fmr: f64) -> Option<(f64, f64)> {
    let mut known: Vec<(f64, f64)> = thresholds.iter().map(|t| (t.fmr, t.threshold)).collect();
    // Of two for one rate, as of U-M and M-U, the stricter.
    known.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.total_cmp(&a.1)));
    known.dedup_by(|a, b| a.0 == b.0);
    let (&highest, &lowest) = (known.first()?, known.last()?);
    if fmr >= highest.0 || fmr <= lowest.0 {
        let (fmr, threshold) = if fmr >= highest.0 { highest } else { lowest };
        return Some((threshold, fmr));
    }
    let pair = known.windows(2).find(|pair| pair[1].0 <= fmr)?;
    let [(fmr_a, a), (fmr_b, b)] = [pair[0], pair[1]];
    let share = (fmr.ln() - fmr_a.ln()) / (fmr_b.ln() - fmr_a.ln());
    Some((a + share * (b - a), fmr))
}

fn show(image: &Path, face: &Embedded, judged: &[Judged]) -> Result<()> {
    let mask = face.mask.map(|mask| format!(": {}", describe_mask(mask))).unwrap_or_default();
    print(&format!("{}{mask}", image.display()))?;
    for (rank, judged) in judged.iter().enumerate() {
        let Candidate { person, score, face } = &judged.candidate;
        let said = match (judged.is_match(), judged.chosen) {
            (Some(is_match), Some(chosen)) => {
                let what = if is_match { "match" } else { "no match" };
                format!("{what}, at {:.4}{}", chosen.threshold, chosen.describe())
            }
            _ => "no threshold".to_owned(),
        };
        print(&format!("{:4}  {score:.4}  {person}  {said}; {}", rank + 1, face.source))?;
    }
    if judged.is_empty() {
        print("      the gallery is empty")?;
    }
    Ok(())
}

fn record(image: &Path, face: &Embedded, judged: &[Judged]) -> serde_json::Value {
    let candidates = judged.iter().map(|judged| {
        json!({
            "person": judged.candidate.person,
            "score": judged.candidate.score,
            "setting": judged.chosen.and_then(|chosen| chosen.seen).map(Setting::name),
            "threshold": judged.chosen.map(|chosen| chosen.threshold),
            "threshold_setting": judged.chosen.and_then(|chosen| chosen.calibrated).map(Setting::name),
            "is_match": judged.is_match(),
            "face": judged.candidate.face,
        })
    });
    json!({
        "image": image.display().to_string(),
        "mask": face.mask,
        "sharpness": face.sharpness,
        "score": face.face.as_ref().map(|face| face.score),
        "candidates": candidates.collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_of_searches_and_of_comparisons_follow_from_each_other() {
        for (fpir, num) in [(0.01, 1), (0.01, 1000), (0.3, 50)] {
            let fmr = fmr_for(fpir, num);
            assert!((fpir_for(fmr, num) - fpir).abs() < 1e-12, "{fpir} {num}");
        }
        assert!((fmr_for(0.01, 1) - 0.01).abs() < 1e-15);
        assert!((fmr_for(0.01, 1_000_000) / 1.005e-8 - 1.0).abs() < 1e-3);
    }

    #[test]
    fn thresholds_between_rates_are_interpolated() {
        let threshold = |fmr: f64, threshold: f64| Threshold {
            fmr,
            threshold,
            fnmr: 0.0,
            setting: "U-U".to_owned(),
            num_impostor: 1,
            num_genuine: 1,
            measured_on: String::new(),
            photos: None,
            computed_with: None,
        };
        let all = [threshold(1e-2, 0.2), threshold(1e-4, 0.4), threshold(1e-1, 0.1)];
        let all: Vec<&Threshold> = all.iter().collect();
        let near = |fmr: f64, expected: (f64, f64)| {
            let found = at_fmr(&all, fmr).unwrap();
            assert!((found.0 - expected.0).abs() < 1e-12 && (found.1 / expected.1 - 1.0).abs() < 1e-12, "{found:?}");
        };
        near(1e-3, (0.3, 1e-3));
        near(1e-2, (0.2, 1e-2));
        near(0.5, (0.1, 0.1));
        near(1e-9, (0.4, 1e-4));
        assert_eq!(at_fmr(&[], 0.1), None);
    }
}
