//! Identity of a face: the parameters that all images of one person share.
//!
//! Lengths are pixels of the aligned 112x112 crop. `u` counts from the midline of the face to the right, `v` from the
//! top of the crop down. Identity is spread over the whole face, so that a mask over one half leaves the other half's
//! share.

use super::draw::{Draw, Purpose};
use super::shape::{Rgb, lerp, mix, rgb};

/// All parameters of a person.
pub(super) struct Identity {
    pub(super) skull: Skull,
    pub(super) skin: Skin,
    pub(super) eyes: Eyes,
    pub(super) brows: Brows,
    pub(super) nose: Nose,
    pub(super) mouth: Mouth,
    pub(super) ears: Ears,
    pub(super) hair: Hair,
    pub(super) beard: Beard,
    pub(super) marks: Marks,
}

/// Outline and large forms; `*_w` are half widths.
pub(super) struct Skull {
    pub(super) temple_w: f32,
    pub(super) cheek_w: f32,
    pub(super) jaw_w: f32,
    pub(super) jaw_v: f32,
    pub(super) chin_w: f32,
    pub(super) chin_v: f32,
    pub(super) chin_cleft: f32,
    pub(super) chin_boss: f32,
    pub(super) cheekbone: f32,
    pub(super) cheek_hollow: f32,
    pub(super) forehead: f32,
    pub(super) neck_w: f32,
}

/// Reflectance of skin.
pub(super) struct Skin {
    pub(super) tone: Rgb,
    pub(super) blush: f32,
    pub(super) gloss: f32,
    /// Picks the mottling.
    pub(super) salt: u32,
}

/// Both eyes; `spacing` is half the distance between their centres.
pub(super) struct Eyes {
    pub(super) spacing: f32,
    pub(super) v: f32,
    pub(super) half_w: f32,
    pub(super) upper: f32,
    pub(super) lower: f32,
    /// How much higher the outer corner is than the inner one.
    pub(super) slant: f32,
    /// Where along the eye the upper lid peaks, -1 (inner) to 1.
    pub(super) peak: f32,
    pub(super) crease: f32,
    pub(super) crease_gap: f32,
    pub(super) iris_r: f32,
    pub(super) iris: Rgb,
    pub(super) socket: f32,
    pub(super) bags: f32,
    pub(super) lashes: f32,
}

/// Both eyebrows.
pub(super) struct Brows {
    /// Distance from the eye's centre up to the brow.
    pub(super) gap: f32,
    pub(super) thickness: f32,
    pub(super) arch: f32,
    /// Where along the brow the arch peaks, 0 (inner) to 1.
    pub(super) arch_at: f32,
    pub(super) slope: f32,
    pub(super) inner_u: f32,
    pub(super) outer_u: f32,
    pub(super) density: f32,
    pub(super) color: Rgb,
    pub(super) ridge: f32,
}

/// The nose.
pub(super) struct Nose {
    pub(super) tip_v: f32,
    pub(super) bridge_w: f32,
    pub(super) tip_w: f32,
    pub(super) wing_w: f32,
    pub(super) bridge_h: f32,
    pub(super) tip_h: f32,
    pub(super) hump: f32,
    /// How much of the nostrils shows.
    pub(super) nostril: f32,
    pub(super) upturn: f32,
    pub(super) skew: f32,
}

/// The mouth.
pub(super) struct Mouth {
    pub(super) v: f32,
    pub(super) half_w: f32,
    pub(super) upper: f32,
    pub(super) lower: f32,
    pub(super) bow: f32,
    pub(super) corners: f32,
    pub(super) fullness: f32,
    pub(super) color: Rgb,
    pub(super) philtrum: f32,
}

/// Both ears.
pub(super) struct Ears {
    pub(super) v: f32,
    pub(super) half_h: f32,
    pub(super) out: f32,
    pub(super) lobe: f32,
}

/// Hair style.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum HairStyle {
    Bald,
    Receding,
    Short,
    Parted,
    Fringe,
    Bob,
    Long,
    Curly,
    TiedBack,
}

/// Hair of the head.
pub(super) struct Hair {
    pub(super) style: HairStyle,
    pub(super) color: Rgb,
    /// Row where the forehead ends on the midline.
    pub(super) line_v: f32,
    /// Depth of the widow's peak.
    pub(super) peak: f32,
    /// How far the hairline recedes above the temples.
    pub(super) recede: f32,
    pub(super) part_u: f32,
    pub(super) volume: f32,
    /// Row down to which the hair reaches at the sides.
    pub(super) side_v: f32,
    pub(super) curl: f32,
    pub(super) salt: u32,
}

/// Hair of the face: how dense each part is, `[0, 1]`.
pub(super) struct Beard {
    pub(super) stubble: f32,
    pub(super) moustache: f32,
    pub(super) goatee: f32,
    pub(super) full: f32,
    pub(super) color: Rgb,
}

/// A mole at `(u, v)`.
pub(super) struct Mole {
    pub(super) u: f32,
    pub(super) v: f32,
    pub(super) r: f32,
}

/// Marks of the skin.
pub(super) struct Marks {
    pub(super) freckles: f32,
    pub(super) freckle_salt: u32,
    pub(super) moles: Vec<Mole>,
    pub(super) wrinkles: f32,
    pub(super) nasolabial: f32,
}

impl Hair {
    /// Whether the hair falls over the ears, like a curtain beside the face.
    pub(super) fn covers_ears(&self) -> bool {
        matches!(self.style, HairStyle::Long | HairStyle::Bob)
    }
}

impl Identity {
    /// Returns the person `identity` of the world `seed`.
    pub(super) fn new(seed: u64, identity: u64) -> Self {
        let d = &mut Draw::new(seed, identity, 0, Purpose::Identity);
        // Traits that correlate in people, so that the parts of a face are plausible together.
        let masculine = d.unit();
        let age = d.unit();
        let melanin = d.unit();
        let hair_color = hair_color(d, melanin, age);
        let eyes = eyes(d, melanin, masculine, age);
        Self {
            skull: skull(d, masculine),
            skin: skin(d, melanin),
            brows: brows(d, masculine, hair_color, &eyes),
            nose: nose(d, melanin, masculine),
            mouth: mouth(d, melanin, masculine),
            ears: Ears {
                v: d.bell(61.0, 2.0),
                half_h: d.bell(12.0, 1.5),
                out: d.range(1.5, 6.5),
                lobe: d.range(0.5, 1.0),
            },
            hair: hair(d, masculine, age, hair_color),
            beard: beard(d, masculine, age, hair_color),
            marks: marks(d, melanin, age),
            eyes,
        }
    }
}

fn skull(d: &mut Draw, masculine: f32) -> Skull {
    let cheek_w = d.bell(40.5, 1.7);
    let jaw_w = cheek_w * (d.bell(0.775, 0.045) + 0.06 * (masculine - 0.5));
    Skull {
        temple_w: cheek_w * d.bell(0.955, 0.03),
        cheek_w,
        jaw_w,
        jaw_v: d.bell(96.0, 2.0),
        chin_w: jaw_w * (d.bell(0.46, 0.07) + 0.08 * (masculine - 0.5)),
        chin_v: d.bell(114.0, 2.6),
        chin_cleft: if d.chance(0.25) { d.range(0.4, 1.0) } else { 0.0 },
        chin_boss: d.range(0.3, 2.6),
        cheekbone: d.range(0.4, 3.2),
        cheek_hollow: d.range(-0.8, 2.2),
        forehead: d.range(0.0, 1.6),
        neck_w: d.bell(25.0, 1.5) + 5.0 * masculine,
    }
}

fn skin(d: &mut Draw, melanin: f32) -> Skin {
    let tones = [
        rgb(240, 205, 186),
        rgb(226, 182, 155),
        rgb(205, 162, 133),
        rgb(174, 129, 101),
        rgb(134, 96, 76),
        rgb(98, 70, 58),
    ];
    let at = melanin * (tones.len() - 1) as f32;
    let low = (at as usize).min(tones.len() - 2);
    let mut tone = mix(tones[low], tones[low + 1], at - low as f32);
    let (red, yellow) = (d.bell(0.0, 0.04), d.bell(0.0, 0.05));
    tone[0] *= 1.0 + red;
    tone[2] *= 1.0 - yellow;
    Skin { tone, blush: d.unit(), gloss: d.range(0.25, 1.0), salt: d.bits() }
}

fn eyes(d: &mut Draw, melanin: f32, masculine: f32, age: f32) -> Eyes {
    let iris = match d.pick(&[1.0 + 5.0 * melanin, 1.0, 1.0 - melanin, 1.0 - melanin, 0.6 * (1.0 - melanin)]) {
        0 => rgb(62, 38, 24),
        1 => rgb(104, 68, 36),
        2 => rgb(98, 132, 164),
        3 => rgb(104, 122, 84),
        _ => rgb(128, 138, 142),
    };
    Eyes {
        spacing: d.bell(17.6, 0.75),
        v: d.bell(51.6, 0.6),
        half_w: d.bell(7.4, 0.6),
        upper: d.bell(3.5, 0.55),
        lower: d.bell(2.0, 0.35),
        slant: d.bell(0.3, 0.75),
        peak: d.range(-0.35, 0.25),
        crease: d.unit(),
        crease_gap: d.range(1.3, 3.2),
        iris_r: d.bell(3.25, 0.15),
        iris,
        socket: d.range(0.6, 4.2),
        bags: d.unit() * (0.3 + 0.7 * age),
        lashes: lerp(d.range(0.5, 1.0), d.range(0.2, 0.6), masculine),
    }
}

fn brows(d: &mut Draw, masculine: f32, hair: Rgb, eyes: &Eyes) -> Brows {
    let inner_u = d.bell(8.2, 1.4) - 1.2 * masculine;
    Brows {
        gap: d.bell(11.2, 1.3) - 1.6 * masculine,
        thickness: d.range(1.3, 2.9) + 1.5 * masculine * d.unit(),
        arch: d.range(0.2, 3.6) - 0.8 * masculine,
        arch_at: d.range(0.45, 0.78),
        slope: d.bell(0.0, 1.2),
        inner_u,
        outer_u: eyes.spacing + d.bell(10.5, 1.1),
        density: d.range(0.5, 0.98),
        color: mix(hair, rgb(40, 28, 20), d.range(0.25, 0.85)),
        ridge: d.range(0.0, 1.4) + 1.8 * masculine * d.unit(),
    }
}

fn nose(d: &mut Draw, melanin: f32, masculine: f32) -> Nose {
    Nose {
        tip_v: d.bell(71.7, 1.4),
        bridge_w: d.range(3.6, 6.4) + 0.8 * melanin,
        tip_w: d.range(4.6, 7.0) + melanin,
        wing_w: d.bell(8.6, 0.9) + 1.4 * melanin,
        bridge_h: d.range(1.8, 5.0) - 0.8 * melanin,
        tip_h: d.range(5.6, 8.8) + 0.6 * masculine,
        hump: if d.chance(0.3) { d.range(0.5, 2.0) } else { d.range(-0.9, 0.3) },
        nostril: d.range(0.35, 1.0),
        upturn: d.range(-1.0, 1.0),
        skew: d.bell(0.0, 0.5),
    }
}

fn mouth(d: &mut Draw, melanin: f32, masculine: f32) -> Mouth {
    let natural = mix(rgb(186, 104, 98), rgb(112, 66, 62), melanin);
    let painted = [rgb(168, 36, 48), rgb(198, 92, 104), rgb(134, 44, 62)][d.pick(&[1.0, 1.0, 0.7])];
    let paint = if d.chance(0.45 * (1.0 - masculine)) { d.range(0.3, 0.75) } else { 0.0 };
    Mouth {
        v: d.bell(92.2, 1.1),
        half_w: d.bell(14.6, 1.25),
        upper: d.range(1.6, 4.2) + 0.7 * melanin,
        lower: d.range(2.8, 5.6) + 0.7 * melanin,
        bow: d.unit(),
        corners: d.bell(0.0, 0.7),
        fullness: d.range(0.6, 2.0),
        color: mix(mix(natural, rgb(196, 128, 116), d.unit() * (1.0 - melanin)), painted, paint),
        philtrum: d.unit(),
    }
}

fn hair_color(d: &mut Draw, melanin: f32, age: f32) -> Rgb {
    let light = (1.0 - 1.5 * melanin).max(0.0);
    let color = match d.pick(&[0.7 + 2.0 * melanin, 1.2, 1.0 * light + 0.1, 0.5 * light, 1.2 * light]) {
        0 => rgb(28, 23, 22),
        1 => rgb(58, 40, 30),
        2 => rgb(98, 66, 42),
        3 => rgb(142, 70, 36),
        _ => rgb(186, 150, 98),
    };
    let grey = if age > 0.6 { d.unit() * (age - 0.6) / 0.4 } else { 0.0 };
    mix(color, rgb(178, 176, 172), grey)
}

fn hair(d: &mut Draw, masculine: f32, age: f32, color: Rgb) -> Hair {
    let (m, f) = (masculine, 1.0 - masculine);
    let styles = [
        (HairStyle::Bald, 0.55 * m * m),
        (HairStyle::Receding, 0.8 * m * age),
        (HairStyle::Short, 1.8 * m + 0.1),
        (HairStyle::Parted, 1.3 * m + 0.4),
        (HairStyle::Fringe, 0.6 * m + 0.9 * f),
        (HairStyle::Bob, 1.2 * f * f),
        (HairStyle::Long, 2.2 * f * f),
        (HairStyle::Curly, 0.5),
        (HairStyle::TiedBack, 1.0 * f),
    ];
    let style = styles[d.pick(&styles.map(|(_, weight)| weight))].0;
    let side_v = match style {
        HairStyle::Bob => d.range(88.0, 104.0),
        HairStyle::Long => 140.0,
        HairStyle::Curly => d.range(62.0, 100.0),
        HairStyle::Bald | HairStyle::TiedBack => d.range(38.0, 46.0),
        _ => d.range(48.0, 62.0),
    };
    let line_v = d.bell(14.0, 3.2);
    Hair {
        style,
        color,
        line_v: match style {
            HairStyle::Fringe => d.range(22.0, 35.0),
            HairStyle::Receding => line_v - d.range(3.0, 9.0),
            HairStyle::Bald => -12.0,
            _ => line_v,
        },
        peak: d.range(-1.0, 4.5),
        recede: if style == HairStyle::Receding { d.range(8.0, 16.0) } else { d.range(0.0, 5.5) * (0.4 + 0.6 * m) },
        part_u: d.range(-20.0, 20.0),
        volume: d.range(1.5, 7.0) + if style == HairStyle::Curly { 3.0 } else { 0.0 },
        side_v,
        curl: if style == HairStyle::Curly { 1.0 } else { d.unit() * 0.6 },
        salt: d.bits(),
    }
}

fn beard(d: &mut Draw, masculine: f32, age: f32, hair: Rgb) -> Beard {
    let mut beard =
        Beard { stubble: 0.0, moustache: 0.0, goatee: 0.0, full: 0.0, color: mix(hair, rgb(44, 30, 22), 0.35) };
    if masculine > 0.5 {
        let kind = d.pick(&[1.3, 1.0, 0.45, 0.5, 0.35 + 0.4 * age]);
        beard.stubble = if kind == 1 { d.range(0.35, 0.9) } else { d.range(0.0, 0.3) };
        let density = d.range(0.6, 0.95);
        match kind {
            2 => beard.moustache = density,
            3 => (beard.goatee, beard.moustache) = (density, if d.chance(0.7) { density } else { 0.0 }),
            4 => (beard.full, beard.moustache) = (density, density),
            _ => {}
        }
    }
    beard
}

fn marks(d: &mut Draw, melanin: f32, age: f32) -> Marks {
    let count = d.pick(&[0.35, 0.3, 0.2, 0.15]);
    let moles = (0..count).map(|_| Mole { u: d.range(-32.0, 32.0), v: d.range(22.0, 104.0), r: d.range(0.7, 1.5) });
    Marks {
        moles: moles.collect(),
        freckles: if melanin < 0.45 && d.chance(0.35) { d.range(0.3, 1.0) } else { 0.0 },
        freckle_salt: d.bits(),
        wrinkles: if age > 0.45 { (age - 0.45) / 0.55 * d.range(0.4, 1.0) } else { 0.0 },
        nasolabial: 0.15 + 0.85 * age * d.unit(),
    }
}
