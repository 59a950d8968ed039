//! `maskinv search`.

use anyhow::Result;
use serde_json::json;

use super::faces::{BATCH, Embedded, Tools, digest};
use super::{ColumnArg, PoolArg, SearchArgs};
use crate::cli::decision::{Setting, describe_mask};
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
    let decision = OpenSet::new(args, tools.model.thresholds(), gallery.info()?.num_people, &tools.name);
    let (mut progress, total, mut unusable, mut records) = (Progress::new(), paths.len(), Vec::new(), Vec::new());
    for (first, batch) in (0..).step_by(BATCH).zip(paths.chunks(BATCH)) {
        let mut read = Vec::new();
        for (i, path) in batch.iter().enumerate() {
            match digest(path) {
                Ok(image) => read.push((first + i, (path.clone(), image))),
                Err(error) => unusable.push((first + i, error)),
            }
        }
        let (indices, images): (Vec<usize>, Vec<_>) = read.into_iter().unzip();
        let (embedded, failed) = tools.embed(&images)?;
        unusable.extend(failed.into_iter().map(|(k, error)| (indices[k], error)));
        let queries: Vec<f32> = embedded.iter().flat_map(|face| &face.embedding).copied().collect();
        let found = finder.search(&queries, args.top.into())?;
        for (face, candidates) in embedded.iter().zip(found) {
            let judged: Vec<Judged> = candidates.into_iter().map(|c| decision.judge(face.mask, c)).collect();
            match args.json {
                true => records.push(record(face, &judged)),
                false => show(face, &judged)?,
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

/// A candidate with the decision about it.
struct Judged {
    candidate: Candidate,
    /// Who wears a mask; none if that is not known.
    setting: Option<Setting>,
    threshold: Option<f64>,
}

impl Judged {
    fn is_match(&self) -> Option<bool> {
        self.threshold.map(|threshold| self.candidate.score >= threshold)
    }
}

/// Thresholds for a search among many people.
struct OpenSet<'a> {
    args: &'a SearchArgs,
    /// Thresholds by setting.
    at: Vec<(Setting, f64)>,
}

impl<'a> OpenSet<'a> {
    /// Chooses the thresholds for the rate at which strangers may be taken for one of `num_people`: each of them is one
    /// more chance of a false match.
    fn new(args: &'a SearchArgs, thresholds: &[Threshold], num_people: usize, model: &str) -> Self {
        let fmr = fmr_for(args.fpir, num_people);
        let mut at = Vec::new();
        for setting in Setting::ALL {
            let of_setting: Vec<&Threshold> = thresholds.iter().filter(|t| setting.is_of(t)).collect();
            let Some((threshold, reached)) = at_fmr(&of_setting, fmr) else { continue };
            if reached > fmr * 1.000_001 && args.threshold.is_none() {
                let fpir = fpir_for(reached, num_people);
                tell(format_args!(
                    "{model}: FPIR {} among {num_people} people needs a false match rate of {fmr:.1e} in {}, and the \
                     lowest calibrated is {reached:.1e}: up to {:.1} % of strangers may match",
                    args.fpir,
                    setting.name(),
                    100.0 * fpir
                ));
            }
            at.push((setting, threshold));
        }
        if at.is_empty() && args.threshold.is_none() {
            tell(format_args!("{model}: no thresholds, so only scores are shown; see maskinv calibrate --all-pairs"));
        }
        Self { args, at }
    }

    fn judge(&self, mask: Option<f32>, candidate: Candidate) -> Judged {
        let masks = mask.zip(candidate.face.mask).map(|(probe, enrolled)| [probe, enrolled]);
        let setting = self.args.setting.or(masks.map(Setting::of));
        // Without knowing who wears a mask, or for a setting that was not calibrated, the strictest.
        let fits = |known: &Setting| setting.is_none_or(|setting| setting == *known);
        let of = |fits: &dyn Fn(&Setting) -> bool| {
            self.at.iter().filter(|(known, _)| fits(known)).map(|(_, threshold)| *threshold).max_by(f64::total_cmp)
        };
        let threshold = self.args.threshold.or(of(&fits)).or(of(&|_| true));
        Judged { candidate, setting, threshold }
    }
}

/// Returns the false match rate at which a stranger matches one of `num_people` with probability `fpir`, if matches with
/// each are independent.
fn fmr_for(fpir: f64, num_people: usize) -> f64 {
    -f64::exp_m1(f64::ln_1p(-fpir) / num_people.max(1) as f64)
}

/// Inverse of [`fmr_for`].
fn fpir_for(fmr: f64, num_people: usize) -> f64 {
    -f64::exp_m1(f64::ln_1p(-fmr) * num_people as f64)
}

/// Returns the threshold for a false match rate, between those that were measured linear in the rate's logarithm, and
/// the rate that it is for: the nearest measured one where the wanted one is beyond them.
fn at_fmr(thresholds: &[&Threshold], fmr: f64) -> Option<(f64, f64)> {
    let mut known: Vec<(f64, f64)> = thresholds.iter().map(|t| (t.fmr, t.threshold)).collect();
    known.sort_by(|a, b| b.0.total_cmp(&a.0));
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

fn show(face: &Embedded, judged: &[Judged]) -> Result<()> {
    let mask = face.mask.map(|mask| format!(": {}", describe_mask(mask))).unwrap_or_default();
    print(&format!("{}{mask}", face.path.display()))?;
    for (rank, judged) in judged.iter().enumerate() {
        let Candidate { person, score, face } = &judged.candidate;
        let by = judged.setting.map(|setting| format!(" for {}", setting.name())).unwrap_or_default();
        let said = match (judged.is_match(), judged.threshold) {
            (Some(true), Some(threshold)) => format!("match, at {threshold:.4}{by}"),
            (Some(false), Some(threshold)) => format!("no match, at {threshold:.4}{by}"),
            _ => "no threshold".to_owned(),
        };
        print(&format!("{:4}  {score:.4}  {person}  {said}; {}", rank + 1, face.source))?;
    }
    if judged.is_empty() {
        print("      the gallery is empty")?;
    }
    Ok(())
}

fn record(face: &Embedded, judged: &[Judged]) -> serde_json::Value {
    let candidates = judged.iter().map(|judged| {
        json!({
            "person": judged.candidate.person,
            "score": judged.candidate.score,
            "setting": judged.setting.map(Setting::name),
            "threshold": judged.threshold,
            "is_match": judged.is_match(),
            "face": judged.candidate.face,
        })
    });
    json!({
        "image": face.path.display().to_string(),
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
