//! Decoding one block.

use super::coding_buffers::CodingBuffers;
use super::side::{unpack_drift, unpack_sides};
use crate::format::plane::plane_bytes;
use crate::lanes::{LANES, groups, groups_mut};
use crate::simd::floats::Floats;
use crate::simd::multiply::Multiply;
use crate::transform::tables::StreamTables;

/// As [`crate::reference::decode`], into `buffers.x`.
#[inline(always)]
pub(crate) fn decode<M: Multiply>(tables: &StreamTables, packed: &[u8], buffers: &mut CodingBuffers) {
    let (d, n) = (tables.head_dim(), tables.block_len());
    let CodingBuffers { x, z, codes, drift, gains, scales, .. } = buffers;
    let (z, gains, scales) = (&mut z[..d * n], &mut gains[..n], &mut scales[..n]);
    let parts = tables.layout.parts(packed);
    unpack_sides::<M::F32x8>(parts.gain, parts.side, gains, scales);
    unpack_drift(parts.drift, &tables.drift_units, drift);
    let mut at = 0;
    for i in 0..d {
        let (z, drift) = (&mut z[i * n..(i + 1) * n], drift[i]);
        if i >= tables.n_coded() {
            z.fill(drift);
            continue;
        }
        let (width, codes) = (tables.layout.widths[i], &mut codes[..n]);
        M::unpack_plane_of_blocks(width, n, &[parts.planes], at, codes);
        at += plane_bytes(width, n);
        let offset = width.level_offset();
        for t in 0..n {
            z[t] = (f32::from(codes[t]) + offset).mul_add(scales[t], drift);
        }
    }
    M::multiply(&tables.synthesis, z, x, (d, n));
    let n_groups = n / LANES;
    let (gains, x) = (groups(gains), groups_mut(x));
    let means = groups(&tables.shape_mean);
    for j in 0..d {
        for t in 0..n_groups {
            let at = j * n_groups + t;
            let shape = M::F32x8::load(&x[at]).add(M::F32x8::load(&means[at]));
            shape.mul(M::F32x8::load(&gains[t])).store(&mut x[at]);
        }
    }
}
