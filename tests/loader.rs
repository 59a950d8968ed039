//! Views and batches: what the teacher and the student see, and that order depends on the seed only.

use std::sync::Arc;

use anyhow::Result;
use image::RgbImage;
use image::imageops::flip_horizontal;
use maskinv::data::mask::{MaskConfig, MaskKind, MaskProtocol};
use maskinv::data::{
    ALIGNED_LANDMARKS, AugmentConfig, Batch, Dataset, Loader, LoaderConfig, OnBroken, Sample, Transform, Views,
};
use maskinv::{Error, Result as CrateResult};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// Gradients of grey that tell their index, label and mirror image.
struct Grey {
    len: usize,
    broken: Option<usize>,
}

impl Dataset for Grey {
    fn len(&self) -> usize {
        self.len
    }

    fn num_identities(&self) -> usize {
        5
    }

    fn label(&self, index: usize) -> u32 {
        (index % 5) as u32
    }

    fn name(&self, index: usize) -> String {
        index.to_string()
    }

    fn get(&self, index: usize) -> CrateResult<Sample> {
        if self.broken == Some(index) {
            return Err(Error::Image { path: "broken.jpg".into(), what: "cut off".into() });
        }
        Ok(Sample { image: face(index as u8), label: self.label(index), landmarks: ALIGNED_LANDMARKS })
    }
}

fn face(value: u8) -> RgbImage {
    RgbImage::from_fn(112, 112, |x, y| image::Rgb([value, x as u8, y as u8]))
}

fn sample() -> Sample {
    Sample { image: face(7), label: 0, landmarks: ALIGNED_LANDMARKS }
}

fn loader(len: usize, threads: usize, seed: u64) -> CrateResult<Loader> {
    let transform = Transform::new(&AugmentConfig::default(), &MaskConfig::default())?;
    let config = LoaderConfig { batch_size: 4, threads, prefetch: 2, balance: 0.0 };
    Loader::new(Arc::new(Grey { len, broken: None }), transform, &config, 28, seed)
}

fn epoch(threads: usize, seed: u64, epoch: u64) -> CrateResult<Vec<Batch>> {
    loader(22, threads, seed)?.epoch(epoch).collect()
}

#[test]
fn batches_depend_on_the_seed_and_not_on_the_number_of_threads() -> Result<()> {
    let one = epoch(1, 3, 0)?;
    assert_eq!(one.len(), 5);
    for threads in [2, 8] {
        assert!(one == epoch(threads, 3, 0)?, "{threads} threads");
    }
    assert!(one != epoch(1, 4, 0)? && one != epoch(1, 3, 1)?);
    Ok(())
}

#[test]
fn an_epoch_sees_each_image_once_and_says_how_many_it_leaves_out() -> Result<()> {
    let loader = loader(22, 2, 0)?;
    assert_eq!((loader.num_batches(), loader.num_left_out()), (5, 2));
    // The red channel tells which image it was; a mask never covers the first row.
    let mut seen: Vec<i64> = Vec::new();
    for batch in loader.epoch(0) {
        let batch = batch?;
        let size = 3 * 28 * 28;
        seen.extend((0..4).map(|i| i64::from(batch.teacher.values[i * size])));
        assert_eq!(batch.labels, seen[seen.len() - 4..].iter().map(|i| i % 5).collect::<Vec<_>>());
    }
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), 20);
    Ok(())
}

#[test]
fn an_unreadable_image_ends_the_epoch_with_its_error() -> Result<()> {
    let transform = Transform::new(&AugmentConfig::default(), &MaskConfig::default())?;
    let config = LoaderConfig { batch_size: 4, threads: 2, prefetch: 1, balance: 0.0 };
    let loader = Loader::new(Arc::new(Grey { len: 22, broken: Some(9) }), transform, &config, 28, 0)?;
    let mut results: Vec<_> = (0..4).flat_map(|e| loader.epoch(e)).filter(CrateResult::is_err).collect();
    let error = results.remove(0).unwrap_err().to_string();
    assert_eq!(error, "broken.jpg: cut off");
    Ok(())
}

#[test]
fn a_broken_image_is_replaced_and_counted_where_settings_say_so() -> Result<()> {
    let epoch = |threads: usize| -> Result<(Vec<Batch>, Vec<String>)> {
        let transform = Transform::new(&AugmentConfig::default(), &MaskConfig::default())?;
        let config = LoaderConfig { batch_size: 4, threads, prefetch: 1, balance: 0.0 };
        let set = Arc::new(Grey { len: 24, broken: Some(9) });
        let loader = Loader::new(set, transform, &config, 28, 0)?.on_broken(OnBroken::Skip);
        let mut batches = loader.epoch(0);
        let made = batches.by_ref().collect::<CrateResult<Vec<_>>>()?;
        Ok((made, batches.broken()))
    };
    let (batches, broken) = epoch(1)?;
    assert_eq!((batches.len(), broken), (6, vec!["broken.jpg: cut off".to_owned()]));
    for threads in [2, 8] {
        assert!(epoch(threads)?.0 == batches, "{threads} threads");
    }
    Ok(())
}

/// The student's views of each image in an epoch, by the image's index.
fn views_by_image(
    set: Grey,
    balance: f64,
    seed: u64,
    epoch: u64,
) -> Result<std::collections::BTreeMap<u32, Vec<Vec<u8>>>> {
    let augment = AugmentConfig { mask: 0.0, misalign: 1.0, ..AugmentConfig::default() };
    let config = LoaderConfig { batch_size: 5, threads: 2, prefetch: 1, balance };
    let transform = Transform::new(&augment, &MaskConfig::default())?;
    let loader = Loader::new(Arc::new(set), transform, &config, 28, seed)?.on_broken(OnBroken::Skip);
    let mut views = std::collections::BTreeMap::<u32, Vec<Vec<u8>>>::new();
    for batch in loader.epoch(epoch) {
        let batch = batch?;
        for (image, values) in batch.images.iter().zip(batch.student.values.chunks_exact(3 * 28 * 28)) {
            views.entry(*image).or_default().push(values.to_vec());
        }
    }
    Ok(views)
}

#[test]
fn an_image_that_comes_again_in_an_epoch_has_other_views() -> Result<()> {
    let mut num_repeated = 0;
    for (balance, broken, epoch) in [(1.0, None, 0), (0.0, Some(9), 0), (0.0, Some(0), 1), (0.5, Some(3), 2)] {
        let all = views_by_image(Grey { len: 25, broken }, balance, 0, epoch)?;
        for (image, views) in all.into_iter().filter(|(_, views)| views.len() > 1) {
            num_repeated += 1;
            let distinct: std::collections::BTreeSet<_> = views.iter().collect();
            assert_eq!(distinct.len(), views.len(), "image {image} with {balance}, {broken:?}");
        }
    }
    assert!(num_repeated >= 5, "{num_repeated}");
    Ok(())
}

#[test]
fn a_stopped_epoch_goes_on_where_it_was() -> Result<()> {
    let whole = epoch(3, 5, 2)?;
    for threads in [1, 2, 8] {
        for first in 0..=5 {
            let rest: Vec<Batch> = loader(22, threads, 5)?.epoch_from(2, first).collect::<CrateResult<_>>()?;
            assert!(rest == whole[first..], "{threads} threads from {first}");
        }
    }
    Ok(())
}

#[test]
fn ranks_share_each_batch_and_each_of_its_mini_batches() -> Result<()> {
    let of = |views: bool| {
        let augment = AugmentConfig { paired: views, ..AugmentConfig::default() };
        let config = LoaderConfig { batch_size: 12, threads: 2, prefetch: 1, balance: 0.0 };
        let transform = Transform::new(&augment, &MaskConfig::default())?;
        Loader::new(Arc::new(Grey { len: 27, broken: None }), transform, &config, 28, 5)
    };
    let batches = |loader: Loader| loader.epoch(1).collect::<CrateResult<Vec<Batch>>>();
    for (paired, num_ranks, num_parts) in [(false, 2, 1), (false, 3, 2), (true, 2, 3)] {
        let together = batches(of(paired)?)?;
        let of_ranks = (0..num_ranks).map(|rank| batches(of(paired)?.shard(rank, num_ranks, num_parts)?));
        let of_ranks = of_ranks.collect::<CrateResult<Vec<_>>>()?;
        assert_eq!(together.len(), 2);
        for (i, batch) in together.into_iter().enumerate() {
            let shares: Vec<Vec<Batch>> =
                of_ranks.iter().map(|batches| batches[i].clone().parts(num_parts)).collect::<CrateResult<_>>()?;
            for (part, whole) in batch.parts(num_parts)?.iter().enumerate() {
                let images: Vec<u32> = shares.iter().flat_map(|share| share[part].images.clone()).collect();
                assert_eq!(whole.images, images);
                let len = whole.student.values.len() / whole.num_views();
                let first_views: Vec<u8> =
                    shares.iter().flat_map(|share| share[part].student.values[..len / num_ranks].to_vec()).collect();
                assert!(whole.student.values[..len] == first_views);
            }
        }
    }
    assert!(of(false)?.shard(2, 2, 1).is_err());
    let refused =
        |ranks, parts| of(false).and_then(|loader| loader.shard(0, ranks, parts)).err().map(|e| e.to_string());
    assert!(refused(5, 1).is_some_and(|e| e.contains("batch_size: expected a multiple of 5 for 5 ranks, found 12")));
    assert!(refused(4, 2).is_some_and(|e| e.contains("a multiple of 8 for 4 ranks in 2 mini-batches, found 12")));
    Ok(())
}

#[test]
fn a_batch_larger_than_the_data_set_is_refused() {
    let error = loader(3, 1, 0).err().unwrap().to_string();
    assert!(error.contains("batch_size: 4 is more than the 3 images"), "{error}");
}

fn views(config: &MaskConfig, augment: AugmentConfig, seed: u64) -> CrateResult<Views> {
    Transform::new(&augment, config)?.views(&sample(), &mut ChaCha8Rng::seed_from_u64(seed))
}

#[test]
fn corrected_views_are_flipped_alike_and_the_teacher_sees_no_mask() -> Result<()> {
    let mut flips = 0;
    for seed in 0..40 {
        let clean =
            views(&MaskConfig::default(), AugmentConfig { flip: 0.5, mask: 0.0, ..AugmentConfig::default() }, seed)?;
        assert_eq!(clean.teacher, clean.student);
        let masked =
            views(&MaskConfig::default(), AugmentConfig { flip: 0.5, mask: 1.0, ..AugmentConfig::default() }, seed)?;
        let is_flipped = masked.teacher != face(7);
        let expected = if is_flipped { flip_horizontal(&face(7)) } else { face(7) };
        assert_eq!(masked.teacher, expected, "the teacher's view is clean");
        assert_eq!(masked.student.get_pixel(0, 0), expected.get_pixel(0, 0), "flipped alike");
        assert_ne!(masked.student.get_pixel(56, 90), expected.get_pixel(56, 90), "the mouth is covered");
        flips += usize::from(is_flipped);
    }
    assert!((8..32).contains(&flips), "{flips} of 40 flipped");
    Ok(())
}

/// A template that covers a square around the mouth, and its five points.
fn template(folder: &std::path::Path) -> Result<MaskConfig> {
    let path = folder.join("template.png");
    image::RgbaImage::from_pixel(112, 60, image::Rgba([250, 250, 250, 255])).save(&path)?;
    Ok(MaskConfig {
        protocol: MaskProtocol::Reference,
        template: Some(path),
        template_points: ALIGNED_LANDMARKS.map(|[x, y]| [x, y - 60.0]),
        ..MaskConfig::default()
    })
}

#[test]
fn reference_views_are_masked_for_both_and_flipped_independently() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let config = template(folder.path())?;
    let (mut alike, mut different) = (0, 0);
    for seed in 0..40 {
        let views = views(&config, AugmentConfig { flip: 0.5, mask: 1.0, ..AugmentConfig::default() }, seed)?;
        assert!(views.is_masked);
        if views.teacher == views.student {
            alike += 1;
        } else {
            assert_eq!(views.teacher, flip_horizontal(&views.student));
            different += 1;
        }
        assert!(views.teacher != face(7) && views.teacher != flip_horizontal(&face(7)), "masked in place");
    }
    assert!(alike >= 8 && different >= 8, "{alike} alike, {different} different");
    Ok(())
}

#[test]
fn the_share_of_masked_images_is_that_of_the_settings() -> Result<()> {
    let config = MaskConfig { kinds: vec![MaskKind::Cloth], ..MaskConfig::default() };
    let augment = AugmentConfig { flip: 0.5, mask: 0.3, ..AugmentConfig::default() };
    let masked = (0..400).map(|seed| views(&config, augment.clone(), seed)).collect::<CrateResult<Vec<_>>>()?;
    let masked = masked.iter().filter(|v| v.is_masked).count();
    assert!((80..160).contains(&masked), "{masked} of 400");
    Ok(())
}
