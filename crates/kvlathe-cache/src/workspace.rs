//! Buffers that a thread keeps from task to task.

use std::cell::RefCell;

use kvlathe_codec::{Aligned, RotationWalk, Scratch};

/// What the buffers are called when there is no memory for them.
pub(crate) const BUFFERS: &str = "a thread's buffers";

/// What one tile adds.
#[derive(Default)]
pub(crate) struct TileSums {
    /// `[queries]`: the factor on what was summed before.
    pub(crate) rescale: Aligned<f32>,
    /// `[queries, value_dim]`.
    pub(crate) added: Aligned<f32>,
}

#[derive(Default)]
pub(crate) struct Workspace {
    pub(crate) scratch: Scratch,
    /// From block to block of one part of attention.
    pub(crate) walk: Option<RotationWalk>,
    /// `[queries, tokens]` of that part.
    pub(crate) scores: Aligned<f32>,
    /// Exact keys or values that are not float32 already.
    pub(crate) wide: Aligned<f32>,
    pub(crate) sums: TileSums,
    /// Keys of a tile, component-major, and its values, token-major.
    pub(crate) tile_keys: Aligned<f32>,
    pub(crate) tile_values: Aligned<f32>,
}

thread_local! {
    static WORKSPACE: RefCell<Workspace> = RefCell::default();
}

/// Runs one task with this thread's buffers.
pub(crate) fn with_workspace<R>(task: impl FnOnce(&mut Workspace) -> R) -> R {
    WORKSPACE.with_borrow_mut(task)
}
