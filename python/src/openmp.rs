//! The OpenMP team that torch runs on, lent to the cache.

use std::ffi::{c_uint, c_void};
use std::sync::Arc;

use kvlathe::cache::{Team, adopt_team};
use pyo3::prelude::*;

/// `GOMP_parallel`, which libgomp and LLVM's libomp export: runs a function on a team of threads, the caller among
/// them, and returns when all have (GNU libgomp manual, "Implementing PARALLEL construct").
type Parallel = unsafe extern "C" fn(extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint);

struct OpenMp(Parallel);

extern "C" fn call(work: *mut c_void) {
    // SAFETY: `OpenMp::run` passes a pointer to a reference that lives until every thread has returned.
    let work = unsafe { &*work.cast::<&(dyn Fn() + Sync)>() };
    work();
}

impl Team for OpenMp {
    fn run(&self, n_threads: usize, work: &(dyn Fn() + Sync)) {
        let data = (&raw const work).cast_mut().cast::<c_void>();
        let n_threads = c_uint::try_from(n_threads).unwrap_or(1);
        // SAFETY: `adopt_openmp`'s caller vouches for the function. `work` outlives the call, is only shared, and does
        // not unwind (`Team::run`'s promise).
        unsafe { (self.0)(call, data, n_threads, 0) };
    }
}

/// Runs attention on the threads of the OpenMP runtime whose `GOMP_parallel` lies at `address`.
#[pyfunction]
pub(crate) fn adopt_openmp(address: usize) {
    if address == 0 {
        return;
    }
    // SAFETY: the package passes what the dynamic linker gave for that name in torch's own library, which is never
    // unloaded; the signature is the runtime's documented ABI.
    let parallel = unsafe { std::mem::transmute::<*const c_void, Parallel>(address as *const c_void) };
    adopt_team(Arc::new(OpenMp(parallel)));
}
