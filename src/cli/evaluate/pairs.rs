//! `--protocol pairs`: all settings on the same pairs, and pairs of photos with real masks.

use anyhow::{Context, Result, bail};
use image::RgbImage;

use super::Job;
use super::output::{Output, Pairs, title};
use super::provenance::sha256_of_images;
use crate::cli::photos::Cropped;
use crate::cli::progress::Progress;
use crate::cli::tell;
use crate::data::TestSet;
use crate::eval::{Evaluation, Figures, MaskedFaces, compare, compare_as_is, figures};
use crate::report::{LeftOut, REAL_MASKS};

/// Evaluates every model.
pub(super) fn measure(run: &Job) -> Result<Output> {
    let config = &run.config.eval;
    let mut progress = Progress::new();
    let mut left_out = LeftOut::default();
    let mut cropped = |test: TestSet| -> Result<TestSet> {
        let Cropped { images, unusable, .. } = run.in_photos(&test.images, &test.used_images(), &mut progress)?;
        let num_pairs = test.pairs.len();
        let test = TestSet { images, ..test }.without(&unusable)?;
        left_out.images += unusable.len();
        left_out.pairs += num_pairs - test.pairs.len();
        Ok(test)
    };
    let test = cropped(run.config.data.open_test()?)?;
    let photos = run.config.data.open_real_masks()?.map(&mut cropped).transpose()?;
    for set in [Some(&test), photos.as_ref()].into_iter().flatten() {
        let with_itself = set.pairs.iter().filter(|pair| pair.a == pair.b).count();
        if with_itself > 0 {
            let what = &set.description;
            tell(format_args!(
                "{what}: {with_itself} pairs of an image with itself, which any system matches; each counts"
            ));
        }
        let repeated = set.repeated_pairs();
        if let Some(&first) = repeated.first() {
            let [a, b] = sides(set, first).map(|image| title(set.images.as_ref(), image));
            let (num, what) = (repeated.len(), &set.description);
            tell(format_args!("{what}: {num} repeated pairs, the first of {a} and {b}; each occurrence counts"));
        }
    }
    let lists = [&config.reference_colours_um, &config.reference_colours_mm];
    if let Some(list) = lists.into_iter().flatten().next().filter(|_| left_out.pairs > 0) {
        bail!("{}: lists colours by the places of pairs, of which none may be left out", list.display());
    }
    let mut output = Output { title: test.description.clone(), left_out, ..Output::default() };
    if let Some(photos) = &photos {
        output.real_masks_title.clone_from(&photos.description);
    }
    let masked_faces = MaskedFaces::new(test.images.as_ref(), config)?;
    for named in run.models {
        let context = || named.name.clone();
        let mut on = |done, total| run.show(&mut progress, done, total);
        let scores = compare(&named.model, &test, config, &mut on).with_context(context)?;
        let prepared = figures(scores.iter().map(|(s, c)| (*s, c)), test.num_folds, config).with_context(context)?;
        let evaluation = Evaluation::of(&prepared).with_context(context)?;
        for (setting, figures) in &prepared {
            let face =
                |image: usize, k: usize, side: usize| match setting.masked(config.mask.protocol, k, test.pairs.len())
                    [side]
                {
                    true => masked_faces.get(image),
                    false => Ok(test.images.get(image)?.image),
                };
            let result = evaluation.get(*setting).expect("it was computed from `prepared`").clone();
            output.take(run, &named.name, setting.name(), figures, result, &pairs(&test, face))?;
        }
        output.evaluations.push(evaluation);
        if let Some(photos) = &photos {
            let comparisons = compare_as_is(&named.model, photos, config, on).with_context(context)?;
            let figures = Figures::new(&comparisons, photos.num_folds, &config.bootstrap).with_context(context)?;
            let result = figures.compute(None).with_context(context)?;
            let face = |image: usize, _, _| Ok(photos.images.get(image)?.image);
            output.take(run, &named.name, REAL_MASKS, &figures, result.clone(), &pairs(photos, face))?;
            output.real_masks.push(result);
        }
    }
    if run.args.report.is_some() {
        output.data_sha256 = Some(sha256(&test)?);
    }
    Ok(output)
}

fn sides(test: &TestSet, k: usize) -> [usize; 2] {
    [test.pairs[k].a, test.pairs[k].b]
}

/// Describes the pairs of a test set; `face(image, k, side)` returns an image as it is compared in pair `k`.
fn pairs<'a>(test: &'a TestSet, face: impl Fn(usize, usize, usize) -> crate::Result<RgbImage> + 'a) -> Pairs<'a> {
    Pairs {
        images: Box::new(|k| sides(test, k).map(|image| test.images.name(image))),
        person: Box::new(|label| test.images.identity_name(label)),
        face: Some(Box::new(move |k, side| {
            let image = sides(test, k)[side];
            Ok((face(image, k, side)?, title(test.images.as_ref(), image)))
        })),
    }
}

fn sha256(test: &TestSet) -> Result<String> {
    let used = test.used_images();
    let number = |image: usize| used.binary_search(&image).expect("the images of all pairs are used");
    let pairs: Vec<_> = test.pairs.iter().map(|p| (number(p.a), number(p.b), p.is_same)).collect();
    let image = |i: usize| -> crate::Result<RgbImage> { Ok(test.images.get(used[i])?.image) };
    sha256_of_images(used.len(), image, &format!("{pairs:?}"))
}
