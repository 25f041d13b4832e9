//! A drawing in pixels, for where SVG can't be shown.

use resvg::tiny_skia::{Color, Pixmap, Transform};
use resvg::usvg::{Options, Tree};

/// Pixels of a unit of the drawing, each way.
const SCALE: f32 = 2.0;

/// A PNG file of an SVG drawing, on white. Texts are set in a font of this system; where it has none they are left out, which the
/// log says.
pub fn png(svg: &str) -> Result<Vec<u8>, String> {
    let mut options = Options::default();
    let fonts = options.fontdb_mut();
    fonts.load_system_fonts();
    if fonts.is_empty() {
        tracing::warn!("a picture without texts: this system has no fonts");
    }
    // The family that drawings name need not be there.
    let family = fonts.faces().next().and_then(|face| Some(face.families.first()?.0.clone()));
    if let Some(family) = family {
        fonts.set_sans_serif_family(family);
    }
    let tree = Tree::from_str(svg, &options).map_err(|error| format!("the drawing is no SVG: {error}"))?;
    let (width, height) = (tree.size().width() * SCALE, tree.size().height() * SCALE);
    let mut pixels = Pixmap::new(width.ceil() as u32, height.ceil() as u32)
        .ok_or_else(|| format!("a picture of {width} times {height} pixels"))?;
    pixels.fill(Color::WHITE);
    resvg::render(&tree, Transform::from_scale(SCALE, SCALE), &mut pixels.as_mut());
    pixels.encode_png().map_err(|error| format!("the picture cannot be written: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pixels_have_the_drawings_colours() {
        let svg = r##"<svg xmlns="http://www.w3.org/2000/svg" width="30" height="20"><rect x="10" y="0" width="20" height="20" fill="#0072B2"/></svg>"##;
        let pixels = Pixmap::decode_png(&png(svg).unwrap()).unwrap();
        assert_eq!((pixels.width(), pixels.height()), (60, 40));
        let colour = |x, y| pixels.pixel(x, y).map(|p| (p.red(), p.green(), p.blue(), p.alpha()));
        assert_eq!((colour(5, 20), colour(40, 20)), (Some((255, 255, 255, 255)), Some((0, 114, 178, 255))));
        assert!(png("<p>no drawing</p>").is_err());
    }
}
