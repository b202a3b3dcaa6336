//! Attention of many queries: tiles of keys and values are decoded into the cache of one core, and served to all queries
//! before the next tile takes their place (as in flash attention).
//!
//! Decoding a block costs about as much as scoring it with forty queries in the coefficient domain, and after that
//! each query is cheaper.

use std::ops::Range;
use std::sync::OnceLock;

use kvlathe_codec::{Element, best_isa, product};

use super::head::{Head, Place};
use super::partial::Partial;
use super::visibility::Sight;
use super::{Call, Output};
use crate::error::Result;
use crate::threads::for_each_task;
use crate::workspace::{BUFFERS, Workspace, with_workspace};

/// Parts of queries that each thread should have to choose from, for balance.
const PARTS_PER_THREAD: usize = 2;
/// Queries of a part: enough to make decoding cheap, few enough for the second-level cache.
const MIN_PART_QUERIES: usize = 256;
const MAX_PART_QUERIES: usize = 2048;
/// From this many queries of one KV head on (a group's queries count each), decoding tiles is faster.
pub(super) const MIN_QUERIES: usize = 40;
/// Tokens of a tile: its keys and values, 64 components of float32 each, fill a quarter of a usual second-level cache.
const TILE_TOKENS: usize = 256;
/// Queries that go through a tile together: their scores stay in the first-level cache.
const TOGETHER: usize = 24;

/// As [`crate::LayerCache::attend`].
pub(super) fn attend<E: Element>(call: &Call<'_, E>, to: &mut Output<'_, E>, n_threads: usize) -> Result<()> {
    let (n_heads, n) = (call.n_heads(), call.n_rows());
    let wanted = (n * n_heads).div_ceil(PARTS_PER_THREAD * n_threads);
    // Equal parts, none a small rest.
    let len = n.div_ceil(n.div_ceil(wanted.clamp(MIN_PART_QUERIES, MAX_PART_QUERIES)));
    let parts: Vec<Range<usize>> = (0..n).step_by(len).map(|first| first..n.min(first + len)).collect();
    let mut partials: Vec<OnceLock<Result<Partial>>> =
        (0..n_heads * parts.len()).map(|_| OnceLock::new()).collect();
    for_each_task(n_threads, partials.len(), &|task| {
        let (head, rows) = (call.head(task / parts.len()), &parts[task % parts.len()]);
        partials[task].get_or_init(|| with_workspace(|workspace| head.many(rows.clone(), workspace)));
    });
    for (at, of_head) in partials.chunks_exact_mut(parts.len()).enumerate() {
        for (rows, partial) in parts.iter().zip(of_head) {
            call.write(at, rows.start, &mut partial.take().expect("every task has run")?, to)?;
        }
    }
    Ok(())
}

/// A place whose width is whole vectors.
fn padded(first: usize, n_placeholders: usize, n_slots: usize) -> Place {
    Place { first, n_placeholders, n_slots, width: n_slots.next_multiple_of(16) }
}

impl<E: Element> Head<'_, E> {
    /// Queries `rows` over all tokens.
    pub(super) fn many(&self, rows: Range<usize>, workspace: &mut Workspace) -> Result<Partial> {
        let mut partial = Partial::default();
        partial.clear(self.values.head_dim(), rows.len())?;
        for (keys, values, first) in self.exact_runs() {
            let (key_dim, value_dim) = (self.keys.head_dim(), self.values.head_dim());
            let n_tokens = keys.len() / key_dim;
            for at in (0..n_tokens).step_by(TILE_TOKENS) {
                let run = at..n_tokens.min(at + TILE_TOKENS);
                let place = padded(first + at, 0, run.len());
                if self.sees_any(&rows, place) {
                    let keys = &keys[run.start * key_dim..run.end * key_dim];
                    let values = &values[run.start * value_dim..run.end * value_dim];
                    self.fill_exact(keys, values, place, workspace)?;
                    self.attend_tile(&rows, place, &mut partial, workspace)?;
                }
            }
        }
        let (n_blocks, block_len) = (self.key.blocks().len(), self.keys.block_len());
        let together = TILE_TOKENS / block_len;
        for at in (0..n_blocks).step_by(together) {
            let blocks = at..n_blocks.min(at + together);
            let first = self.key.blocks_at() + at * block_len;
            let n_placeholders = self.key.coded_at().saturating_sub(first);
            let place = padded(first, n_placeholders, blocks.len() * block_len);
            if self.sees_any(&rows, place) {
                self.fill_decoded(blocks, place, workspace)?;
                self.attend_tile(&rows, place, &mut partial, workspace)?;
            }
        }
        Ok(partial)
    }

    fn sees_any(&self, rows: &Range<usize>, place: Place) -> bool {
        let tokens = place.first + place.n_placeholders..place.first + place.n_slots;
        !matches!(self.visibility.sight(rows.clone(), tokens), Sight::None)
    }

    fn size_tile(&self, place: Place, workspace: &mut Workspace) -> Result<()> {
        workspace.tile_keys.resize(self.keys.head_dim() * place.width, BUFFERS)?;
        workspace.tile_values.resize(place.width * self.values.head_dim(), BUFFERS)?;
        // Padding gets no weight, but must be finite.
        workspace.tile_values[place.n_slots * self.values.head_dim()..].fill(0.0);
        if place.n_slots < place.width {
            let keys = workspace.tile_keys.chunks_exact_mut(place.width);
            keys.for_each(|row| row[place.n_slots..].fill(0.0));
        }
        Ok(())
    }

    fn fill_exact(&self, keys: &[E], values: &[E], place: Place, workspace: &mut Workspace) -> Result<()> {
        self.size_tile(place, workspace)?;
        let Workspace { tile_keys, tile_values, .. } = workspace;
        for (t, key) in keys.chunks_exact(self.keys.head_dim()).enumerate() {
            for (j, value) in key.iter().enumerate() {
                tile_keys[j * place.width + t] = value.to_f32();
            }
        }
        for (wide, value) in tile_values.iter_mut().zip(values) {
            *wide = value.to_f32();
        }
        Ok(())
    }

    fn fill_decoded(&self, blocks: Range<usize>, place: Place, workspace: &mut Workspace) -> Result<()> {
        self.size_tile(place, workspace)?;
        let Workspace { tile_keys, tile_values, scratch, .. } = workspace;
        let (n, isa) = (self.keys.block_len(), best_isa());
        let (key_range, value_range) = (self.keys.head_range(self.head), self.values.head_range(self.head));
        let centre = (place.first + n / 2) as i64;
        // R(c) is R(−(−c)).
        let mut walk = self.keys.rope().map(|rope| rope.walk_back(-centre, -(n as i64)));
        let value_len = n * self.values.head_dim();
        for (i, values) in blocks.zip(tile_values.chunks_exact_mut(value_len)) {
            let column = (i * n + self.key.blocks_at()) - place.first;
            let turn_forward = walk.as_ref().map(|walk| walk.rotation());
            let packed = &self.key.blocks()[i].packed()[key_range.clone()];
            let columns = (&mut tile_keys[column..], place.width);
            self.key_stream().decode_columns(isa, packed, turn_forward, columns, scratch)?;
            let packed = &self.value.blocks()[i].packed()[value_range.clone()];
            self.value_stream().decode_block(isa, packed, None, values, scratch)?;
            if let Some(walk) = &mut walk {
                walk.advance();
            }
        }
        Ok(())
    }

    fn attend_tile(
        &self,
        rows: &Range<usize>,
        place: Place,
        partial: &mut Partial,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let Workspace { tile_keys, tile_values, scores, sums, .. } = workspace;
        let key_dim = self.keys.head_dim();
        for start in rows.clone().step_by(TOGETHER) {
            let run = start..rows.end.min(start + TOGETHER);
            if !self.sees_any(&run, place) {
                continue;
            }
            scores.resize(run.len() * place.width, BUFFERS)?;
            let queries = &self.queries[run.start * key_dim..run.end * key_dim];
            product(best_isa(), queries, tile_keys, scores, (key_dim, place.width));
            self.add_tile(scores, tile_values, place, (run, start - rows.start), partial, sums)?;
        }
        Ok(())
    }
}
