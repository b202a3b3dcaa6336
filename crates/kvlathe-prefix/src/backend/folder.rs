//! In a folder, one file an object, mapped when it is read: processes that read the same prefix share its pages.

use std::fs::{self, File, FileTimes};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use kvlathe_preset::atomic_write;
use tokio::task::spawn_blocking;

use super::{Backend, Entry, Failure};
use crate::container::mapped;

/// A file beside its place is a killed writer's after this.
const ABANDONED: Duration = Duration::from_secs(3600);

/// The folder, which exists.
#[derive(Debug)]
pub(super) struct Folder(PathBuf);

impl Folder {
    /// Makes the folder if it is not there.
    pub(super) fn open(path: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&path)?;
        Ok(Self(path))
    }

    /// Names are ours: digits, dashes and two slashes, so none leaves the folder.
    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

async fn off_the_loop<T: Send + 'static>(
    go: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, Failure> {
    Ok(spawn_blocking(go).await??)
}

/// Whoever may only read, or lost a race with an eviction, notes nothing.
fn may_only_read(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem)
}

fn there<T>(found: io::Result<T>) -> io::Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[async_trait]
impl Backend for Folder {
    async fn get(&self, name: &str) -> Result<Option<Bytes>, Failure> {
        let path = self.path(name);
        off_the_loop(move || {
            let Some(file) = there(File::open(path))? else { return Ok(None) };
            mapped(&file).map(Some)
        })
        .await
    }

    async fn put(&self, name: &str, bytes: Bytes) -> Result<(), Failure> {
        let path = self.path(name);
        off_the_loop(move || {
            if let Some(folder) = path.parent() {
                fs::create_dir_all(folder)?;
            }
            atomic_write(&path, |file| io::Write::write_all(file, &bytes))
        })
        .await
    }

    async fn exists(&self, name: &str) -> Result<bool, Failure> {
        let path = self.path(name);
        off_the_loop(move || path.try_exists()).await
    }

    async fn delete(&self, name: &str) -> Result<(), Failure> {
        let path = self.path(name);
        off_the_loop(move || there(fs::remove_file(path)).map(drop)).await
    }

    async fn list(&self) -> Result<Vec<Entry>, Failure> {
        let root = self.0.clone();
        off_the_loop(move || {
            let mut found = Vec::new();
            collect(&root, &root, &mut found)?;
            Ok(found)
        })
        .await
    }

    /// A byte more: what several processes append at once adds up.
    async fn count(&self, name: &str) -> Result<(), Failure> {
        let path = self.path(name);
        off_the_loop(move || {
            let mut file = match File::options().append(true).create(true).open(path) {
                Err(error) if may_only_read(&error) => return Ok(()),
                opened => opened?,
            };
            io::Write::write_all(&mut file, b".")
        })
        .await
    }

    async fn counted(&self, name: &str) -> Result<Option<u64>, Failure> {
        let path = self.path(name);
        off_the_loop(move || Ok(Some(there(fs::metadata(path))?.map_or(0, |of_file| of_file.len())))).await
    }

    async fn touch(&self, name: &str) -> Result<(), Failure> {
        let path = self.path(name);
        off_the_loop(move || {
            let file = match File::options().append(true).open(path) {
                Err(error) if may_only_read(&error) => return Ok(()),
                opened => opened?,
            };
            file.set_times(FileTimes::new().set_modified(SystemTime::now()))
        })
        .await
    }
}

/// All files below `folder`, by their names below `root`. What killed writers left is removed on the way.
fn collect(root: &Path, folder: &Path, found: &mut Vec<Entry>) -> io::Result<()> {
    let Some(entries) = there(fs::read_dir(folder))? else { return Ok(()) };
    for entry in entries {
        let entry = entry?;
        let Some(of_file) = there(entry.metadata())? else { continue };
        let (path, used_at) = (entry.path(), of_file.modified()?);
        if of_file.is_dir() {
            collect(root, &path, found)?;
        } else if entry.file_name().to_string_lossy().starts_with('.') {
            let age = SystemTime::now().duration_since(used_at).unwrap_or_default();
            if age > ABANDONED && path.extension().is_some_and(|end| end == "tmp") {
                there(fs::remove_file(&path))?;
            }
        } else if of_file.is_file()
            && let Some(name) = path.strip_prefix(root).ok().and_then(Path::to_str)
        {
            found.push(Entry { name: name.to_owned(), n_bytes: of_file.len(), used_at });
        }
    }
    Ok(())
}
