//! Replace a file as a whole or not at all.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Removes the temporary file unless it was renamed.
struct TempFile {
    path: PathBuf,
    keep: bool,
}

impl Drop for TempFile {
    fn drop(&mut self) {
        if !self.keep {
            // Nothing sensible can be done about a failure here, and the write has already failed.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Has `write` fill a new file beside `path`, flushes it to the disk, and renames it to `path`.
///
/// The same folder, because a rename is atomic only within one file system. A reader sees the old file or the
/// new one, and so does whoever looks after a crash. If `path` is a symbolic link, the link is replaced. A process that
/// is killed may leave a file behind whose name is a dot, that of `path`, and `.tmp` at the end.
///
/// # Errors
/// What the system or `write` say. `path` is as it was then, unless the disk fails at the very end.
pub fn atomic_write(path: &Path, write: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    let (mut temp, mut file) = create_beside(path)?;
    write(&mut file)?;
    file.sync_all()?;
    drop(file);
    fs::rename(&temp.path, path)?;
    temp.keep = true;
    sync_folder_of(path)
}

/// The new name is in the folder, which has to reach the disk as well. Not every system and file system can be told to.
fn sync_folder_of(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match File::open(folder).map(|folder| folder.sync_all()) {
        Ok(Err(error))
            if !matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) =>
        {
            Err(error)
        }
        _ => Ok(()),
    }
}

fn create_beside(path: &Path) -> io::Result<(TempFile, File)> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    loop {
        let mut temp_name = OsString::from(".");
        temp_name.push(name);
        temp_name.push(format!(".{}.{}.tmp", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed)));
        let temp_path = path.with_file_name(temp_name);
        // A leftover of a killed process that had our id must not be reused: take the next name.
        match OpenOptions::new().write(true).create_new(true).open(&temp_path) {
            Ok(file) => return Ok((TempFile { path: temp_path, keep: false }, file)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
}
