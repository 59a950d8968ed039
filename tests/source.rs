//! Who is trained on and who is tested on, and what an evaluation does with them.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::Result;
use candle_core::Device;
use image::RgbImage;
use maskinv::data::mask::{MaskConfig, MaskProtocol, TemplateShift};
use maskinv::data::{ALIGNED_LANDMARKS, DataConfig, Dataset, ProceduralConfig, ProceduralTest};
use maskinv::eval::{EvalConfig, Setting, compare, details, evaluate, table};
use maskinv::models::{Arch, Model, ModelConfig};

/// Writes `people` with `images` crops each.
fn write_faces(root: &Path, people: &[&str], images: usize) -> Result<()> {
    for (p, name) in people.iter().enumerate() {
        std::fs::create_dir_all(root.join(name))?;
        for i in 1..=images {
            let image = RgbImage::from_fn(112, 112, |x, y| image::Rgb([(31 * p) as u8, x as u8, (y + i as u32) as u8]));
            image.save(root.join(format!("{name}/{name}_{i:04}.png")))?;
        }
    }
    Ok(())
}

/// The people of a set, by the folder in each image's path.
fn people(dataset: &dyn Dataset) -> BTreeSet<String> {
    let folder = |i| Path::new(&dataset.name(i)).parent().and_then(|p| p.file_name()).unwrap().to_owned();
    (0..dataset.len()).map(|i| folder(i).into_string().unwrap()).collect()
}

fn names(of: &[&str]) -> BTreeSet<String> {
    of.iter().map(|n| (*n).to_owned()).collect()
}

#[test]
fn a_folder_is_split_into_people_to_train_and_others_to_test() -> Result<()> {
    let root = tempfile::tempdir()?;
    write_faces(root.path(), &["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"], 2)?;
    let config = DataConfig { root: Some(root.path().into()), test_share: 0.3, ..DataConfig::default() };
    let splits = config.open()?;
    let (train, test) = (people(&*splits.train), people(&*splits.test.images));
    assert_eq!((train.len(), test.len()), (7, 3));
    assert!(train.is_disjoint(&test));
    assert_eq!(people(&*config.open()?.test.images), test);
    let other = DataConfig { split_seed: 1, ..config };
    assert_ne!(people(&*other.open()?.test.images), test);
    Ok(())
}

#[test]
fn people_that_a_list_of_pairs_names_are_not_trained_on() -> Result<()> {
    let root = tempfile::tempdir()?;
    write_faces(&root.path().join("faces"), &["a", "b", "c", "d", "e"], 2)?;
    let pairs = root.path().join("pairs.txt");
    std::fs::write(&pairs, "a 1 2\nb 1 2\na 1 b 2\na 2 d 1\n")?;
    let config = DataConfig { root: Some(root.path().join("faces")), pairs: Some(pairs), ..DataConfig::default() };
    let splits = config.open()?;
    assert_eq!(people(&*splits.train), names(&["c", "e"]));
    assert_eq!((splits.test.pairs.len(), splits.test.num_folds), (4, 4));
    assert_eq!(splits.test.used_images().len(), 5);
    Ok(())
}

#[test]
fn folds_of_lfw_lists_decide_who_is_trained_and_tested_on() -> Result<()> {
    let root = tempfile::tempdir()?;
    write_faces(&root.path().join("images"), &["a", "b", "c", "d", "e", "f"], 2)?;
    std::fs::write(root.path().join("people.txt"), "3\n2\na\t2\nb\t2\n2\nc\t2\nd\t2\n2\ne\t2\nf\t2\n")?;
    let pairs = "3\t1\na\t1\t2\na\t1\tb\t1\nc\t1\t2\nc\t1\td\t1\ne\t1\t2\ne\t1\tf\t2\n";
    std::fs::write(root.path().join("pairs.txt"), pairs)?;
    let config = DataConfig { root: Some(root.path().into()), test_folds: vec![2, 3], ..DataConfig::default() };
    let splits = config.open()?;
    assert_eq!(people(&*splits.train), names(&["a", "b"]));
    assert_eq!((splits.test.pairs.len(), splits.test.num_folds), (4, 2));
    let wrong = |config: DataConfig| config.open().err().unwrap().to_string();
    let error = wrong(DataConfig { test_folds: vec![2, 4], ..config.clone() });
    assert!(error.contains("pairs.txt: expected fold 4, found 3 folds"), "{error}");
    let error = wrong(DataConfig { test_folds: vec![3], ..config.clone() });
    assert!(error.contains("expected two folds or more"), "{error}");
    let error = wrong(DataConfig { test_folds: vec![2, 2], ..config.clone() });
    assert!(error.contains("fold 2 is named twice"), "{error}");
    let error = wrong(DataConfig { train_folds: vec![2], ..config });
    assert!(error.contains("fold 2 is named twice"), "{error}");
    Ok(())
}

#[test]
fn test_sets_without_both_kinds_of_pairs_are_refused() -> Result<()> {
    let root = tempfile::tempdir()?;
    write_faces(&root.path().join("faces"), &["a", "b", "c"], 2)?;
    let pairs = root.path().join("pairs.txt");
    std::fs::write(&pairs, "a 1 2\nb 1 2\n")?;
    let config = DataConfig { root: Some(root.path().join("faces")), pairs: Some(pairs), ..DataConfig::default() };
    let error = config.open_test().err().unwrap().to_string();
    assert!(error.contains("expected genuine and impostor pairs, found 2 and 0"), "{error}");
    Ok(())
}

fn procedural() -> DataConfig {
    DataConfig {
        procedural: ProceduralConfig { num_identities: 3, images_per_identity: 2, ..ProceduralConfig::default() },
        procedural_test: ProceduralTest { num_identities: 5, images_per_identity: 3 },
        ..DataConfig::default()
    }
}

fn model() -> Result<Model> {
    let config =
        ModelConfig { arch: Arch::R18, width: 0.125, embedding_size: 16, input_size: 32, ..Default::default() };
    Ok(Model::new(&config, &Device::Cpu, 0)?)
}

#[test]
fn tested_procedural_people_follow_the_trained_ones() -> Result<()> {
    let splits = procedural().open()?;
    let first = |d: &dyn Dataset, i| d.name(i);
    assert!(first(&*splits.train, 5).starts_with("id0002"), "{}", first(&*splits.train, 5));
    assert!(first(&*splits.test.images, 0).starts_with("id0003"), "{}", first(&*splits.test.images, 0));
    let huge = ProceduralTest { num_identities: 4_000_000_000, images_per_identity: 1_000_000_000 };
    let error = DataConfig { procedural_test: huge, ..procedural() }.open().err().unwrap().to_string();
    assert!(error.contains("procedural_test: expected up to 10000000 images"), "{error}");
    Ok(())
}

#[test]
fn an_evaluation_does_not_depend_on_batches_and_masks_change_only_masked_settings() -> Result<()> {
    let (test, model) = (procedural().open_test()?, model()?);
    let run = |config: EvalConfig| evaluate(&model, &test, &config, |_, _| {});
    let base = run(EvalConfig::default())?;
    let close = |a: f64, b: f64| (a - b).abs() <= 1e-6;
    let batched = run(EvalConfig { batch_size: 2, ..EvalConfig::default() })?;
    for setting in Setting::ALL {
        let (a, b) = (&base.settings[&setting].metrics, &batched.settings[&setting].metrics);
        assert!(close(a.g_mean, b.g_mean) && close(a.i_mean, b.i_mean), "{setting:?}: {a:?} {b:?}");
    }
    let other = run(EvalConfig { seed: 1, ..EvalConfig::default() })?;
    assert_eq!(base.get(Setting::UU), other.get(Setting::UU));
    assert_ne!(base.get(Setting::UM), other.get(Setting::UM));
    assert_ne!(base.get(Setting::MM), other.get(Setting::MM));
    let (short, long) = (table(&[("a model", &base)]), details(&base));
    assert!(
        short.contains("a model") && long.contains("FMR1000") && long.contains("accuracy over folds"),
        "{short}\n{long}"
    );
    Ok(())
}

#[test]
fn the_reference_evaluation_never_shifts_its_template() -> Result<()> {
    let root = tempfile::tempdir()?;
    let template = root.path().join("template.png");
    image::RgbaImage::from_pixel(112, 60, image::Rgba([250, 250, 250, 255])).save(&template)?;
    let (test, model) = (procedural().open_test()?, model()?);
    let run = |template_shift| {
        let mask = MaskConfig {
            protocol: MaskProtocol::Reference,
            template: Some(template.clone()),
            template_points: ALIGNED_LANDMARKS.map(|[x, y]| [x, y - 60.0]),
            template_shift,
            ..MaskConfig::default()
        };
        evaluate(&model, &test, &EvalConfig { mask, ..EvalConfig::default() }, |_, _| {})
    };
    assert_eq!(run(TemplateShift::Training)?, run(TemplateShift::None)?);
    Ok(())
}

/// The published evaluation reads the colour of every masked image from a list: one for U-M, which masks the second
/// half of all images, and one for M-M.
#[test]
fn published_colours_are_those_of_their_images_and_settings() -> Result<()> {
    let root = tempfile::tempdir()?;
    let template = root.path().join("template.png");
    image::RgbaImage::from_pixel(112, 60, image::Rgba([250, 250, 250, 255])).save(&template)?;
    let (test, model) = (procedural().open_test()?, model()?);
    let num = 2 * test.pairs.len();
    let list = |name: &str, places: std::ops::Range<usize>, colour: &dyn Fn(usize) -> usize| -> Result<_> {
        let path = root.path().join(name);
        let lines = places.map(|i| format!("{i},[{} 5 90]\n", colour(i)));
        std::fs::write(&path, lines.collect::<String>())?;
        Ok(path)
    };
    let run = |um, mm| {
        let mask = MaskConfig {
            protocol: MaskProtocol::Reference,
            template: Some(template.clone()),
            template_points: ALIGNED_LANDMARKS.map(|[x, y]| [x, y - 60.0]),
            ..MaskConfig::default()
        };
        let config = EvalConfig { mask, reference_colours_um: um, reference_colours_mm: mm, ..EvalConfig::default() };
        compare(&model, &test, &config, |_, _| {})
    };
    let drawn = run(None, None)?;
    let same = list("same.txt", 0..num, &|_| 7)?;
    let other = list("other.txt", 0..num, &|i| if i == num - 1 { 140 } else { 7 })?;
    let second_half = list("half.txt", num / 2..num, &|_| 7)?;
    let all = run(Some(second_half.clone()), Some(same))?;
    let last = test.pairs.len() - 1;
    assert_eq!(all[&Setting::UU], drawn[&Setting::UU]);
    // Half of the pairs of U-M are unmasked ones, the others have the colours of M-M here.
    for i in 0..=last {
        let of = |setting| all[&setting].scores()[i];
        let alike = match [2 * i, 2 * i + 1].map(|place| place >= num / 2) {
            [false, false] => of(Setting::UU),
            [true, true] => of(Setting::MM),
            // The pair in the middle of an odd number.
            _ => continue,
        };
        assert!((of(Setting::UM) - alike).abs() < 1e-6, "pair {i}");
    }
    let changed = run(Some(second_half.clone()), Some(other))?;
    let differs = |i: usize| (changed[&Setting::MM].scores()[i] - all[&Setting::MM].scores()[i]).abs() > 1e-6;
    assert!(differs(last) && !(0..last).any(differs));
    assert_eq!(changed[&Setting::UM], all[&Setting::UM]);
    let error = run(None, Some(second_half)).err().unwrap().to_string();
    assert!(error.contains("half.txt: expected a colour for image 0 of"), "{error}");
    let config = EvalConfig { reference_colours_um: Some(template), ..EvalConfig::default() };
    assert!(config.validate().err().unwrap().to_string().contains("mask.protocol reference"));
    Ok(())
}

#[test]
fn lists_belong_to_a_set_by_its_name() -> Result<()> {
    let root = tempfile::tempdir()?;
    let (all, lfw) = (root.path().join("all"), root.path().join("lfw"));
    write_faces(&all, &["a", "b", "c", "d", "e", "f", "g", "h"], 3)?;
    write_faces(&lfw.join("images"), &["p", "q", "r", "s"], 3)?;
    std::fs::write(lfw.join("people.txt"), "2\n2\np\t3\nq\t3\n2\nr\t3\ns\t3\n")?;
    std::fs::write(lfw.join("pairs.txt"), "2\t1\np\t1\t2\np\t1\tq\t2\nr\t1\t3\nr\t2\ts\t1\n")?;
    let packed = root.path().join("packed");
    let convert = |from: &Path, to: &str| -> Result<std::path::PathBuf> {
        let to = packed.join(to);
        let output = crate::cli::maskinv(&["data", "convert", crate::cli::str(from), crate::cli::str(&to)])?;
        anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        // It says how many people the set next to it has, and is refused where another lies.
        std::fs::remove_file(packed.join("property"))?;
        Ok(to)
    };
    let test = |root: &Path| -> Result<(usize, usize)> {
        let config =
            DataConfig { root: Some(root.into()), test_folds: vec![1, 2], test_share: 0.5, ..Default::default() };
        let test = config.open_test()?;
        Ok((test.pairs.len(), test.num_folds))
    };
    let of_lfw = convert(&lfw, "lfw.rec")?;
    assert!(packed.join("lfw.people.txt").is_file() && packed.join("lfw.pairs.txt").is_file());
    assert_eq!(test(&of_lfw)?, (4, 2));
    // Another set beside it has people of its own: pairs are drawn.
    let of_all = convert(&all, "all.rec")?;
    let (num, folds) = test(&of_all)?;
    assert!(num > 4 && folds == 10, "{num}");
    assert_eq!(test(&of_lfw)?, (4, 2), "and LFW keeps its lists");
    // Plain lists beside several sets belong to none; beside one set, or in a folder, they are its own.
    for list in ["people.txt", "pairs.txt"] {
        std::fs::copy(lfw.join(list), packed.join(list))?;
    }
    assert_eq!(test(&of_all)?, (num, folds));
    // A list that lies there would count as one of a set converted later.
    std::fs::write(packed.join("new.pairs.txt"), "")?;
    let refused = convert(&lfw, "new.rec").expect_err("a stale list").to_string();
    assert!(refused.contains("new.pairs.txt: exists already") && !packed.join("new.rec").exists(), "{refused}");
    for extension in ["rec", "idx", "lst", "people.txt", "pairs.txt"] {
        std::fs::remove_file(packed.join(if extension.len() > 3 {
            format!("lfw.{extension}")
        } else {
            format!("all.{extension}")
        }))?;
    }
    // Another system's notes about a set are no other set.
    std::fs::write(packed.join("._lfw.rec"), "")?;
    assert_eq!(test(&of_lfw)?, (4, 2));
    // A verification file goes along under the set's name.
    let bin = packed.join("lfw.bin");
    let pairs = ["data", "pairs", crate::cli::str(&all), crate::cli::str(&bin), "--genuine", "3", "--impostor", "3"];
    assert!(crate::cli::maskinv(&pairs)?.status.success());
    std::fs::remove_file(packed.join("pairs.txt"))?;
    assert_eq!(test(&of_lfw)?.0, 6);
    let again = root.path().join("again.rec");
    let output = crate::cli::maskinv(&["data", "convert", crate::cli::str(&of_lfw), crate::cli::str(&again)])?;
    assert!(output.status.success() && root.path().join("again.bin").is_file());
    assert_eq!(test(&again)?.0, 6);
    Ok(())
}
