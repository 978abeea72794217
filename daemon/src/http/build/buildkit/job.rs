//! A build that a client with BuildKit wants.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use skep_api::buildkit::upload::BytesMessage;
use skep_api::buildkit::upload::upload_client::UploadClient;
use skep_api::with_causes;
use skep_engine::{BuildClient, BuildError, Engine, Image, NamedContext};
use tokio::sync::{mpsc, watch};
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;

use super::BuildKit;
use super::directories::{Directories, Kept};
use super::files::{self, Wanted};
use super::progress::{OwnStep, Progress};
use super::request::{self, Asked, Source};
use super::session::{Session, Sessions};
use crate::http::build::{Context, remote};

/// How long a client that follows a build may take to say what is to be built, or the other way round.
const MEETING_LIMIT: Duration = Duration::from_secs(10);
/// How long what was told of a build can still be heard.
const HEARD_FOR: Duration = Duration::from_secs(10);
/// Builds that are known at a time.
const JOBS_MAX: usize = 1000;
const OUTPUT_AHEAD: usize = 256;
const NOTE_EVERY: Duration = Duration::from_millis(200);
/// What lists files that a context leaves out.
const IGNORE_FILE: &str = ".dockerignore";

/// What a client that builds by itself came to: an image, or nothing.
pub(super) type Returned = Result<Option<String>, Status>;

/// A build under way.
pub(super) struct Job {
    pub(super) session: String,
    pub(super) progress: Progress,
    pub(super) returned: watch::Sender<Option<Returned>>,
    /// The context, where it came with the request.
    given: Option<Context>,
    /// The images that it came to, by the names they have with the client.
    built: Mutex<BTreeMap<String, Image>>,
}

/// The builds that are known, by the names that clients gave them.
#[derive(Default)]
pub(super) struct Jobs {
    known: Arc<Mutex<HashMap<String, Arc<Job>>>>,
    changed: watch::Sender<()>,
}

/// A job, over when it is dropped.
pub(super) struct UnderWay {
    job: Arc<Job>,
    name: String,
    known: Arc<Mutex<HashMap<String, Arc<Job>>>>,
}

impl std::ops::Deref for UnderWay {
    type Target = Arc<Job>;

    fn deref(&self) -> &Arc<Job> {
        &self.job
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.job.progress.end();
        let (known, name) = (self.known.clone(), std::mem::take(&mut self.name));
        tokio::spawn(async move {
            tokio::time::sleep(HEARD_FOR).await;
            known.lock().unwrap_or_else(PoisonError::into_inner).remove(&name);
        });
    }
}

impl Jobs {
    pub(super) fn begin(&self, name: &str, session: &str, given: Option<Context>) -> Result<UnderWay, Status> {
        let job = Arc::new(Job {
            session: session.to_owned(),
            progress: Progress::new(name),
            returned: watch::Sender::default(),
            given,
            built: Mutex::default(),
        });
        {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            if known.len() >= JOBS_MAX {
                return Err(Status::resource_exhausted(format!(
                    "more than {JOBS_MAX} builds are under way: try later"
                )));
            }
            if known.contains_key(name) {
                return Err(Status::already_exists(format!("the build {name} is under way already")));
            }
            known.insert(name.to_owned(), job.clone());
        }
        self.changed.send_replace(());
        Ok(UnderWay { job, name: name.to_owned(), known: self.known.clone() })
    }

    /// A build, which may be about to begin.
    pub(super) async fn get(&self, name: &str) -> Result<Arc<Job>, Status> {
        let mut changed = self.changed.subscribe();
        let met = async {
            loop {
                if let Some(job) = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(name) {
                    return job.clone();
                }
                if changed.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        let late = |_| Status::not_found(format!("no build {name} is known"));
        tokio::time::timeout(MEETING_LIMIT, met).await.map_err(late)
    }
}

impl Job {
    pub(super) fn image(&self, name: &str) -> Option<Image> {
        self.built.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// Builds what the attributes ask for; returns the name of what it came to.
    pub(super) async fn build(
        self: &Arc<Self>,
        engine: &Arc<Engine>,
        BuildKit { sessions, directories, .. }: &BuildKit,
        attributes: &HashMap<String, String>,
    ) -> Result<String, Status> {
        let asked = request::read(attributes)?;
        let session = sessions.get(&self.session).await?;
        let dir = Context::new(engine).map_err(|error| Status::internal(error.text()))?;
        let mut fetching =
            Fetching { job: self, sessions, directories, session: &session, dir: dir.path(), kept: Vec::new() };
        let (root, mut options) = fetching.all(asked).await?;
        let kept = std::mem::take(&mut fetching.kept);
        options.client = BuildClient::new(session.clone());
        let (output, mut told) = mpsc::channel(OUTPUT_AHEAD);
        let engine = engine.clone();
        // It goes when nobody waits for it: its containers with it.
        let building = AbortOnDropHandle::new(tokio::spawn(async move {
            let built = engine.build(&root, &options, &output).await;
            drop((dir, kept));
            built
        }));
        while let Some(output) = told.recv().await {
            self.progress.tell(output);
        }
        let image =
            building.await.map_err(|error| Status::internal(error.to_string()))?.map_err(|error| status(&error))?;
        let mut built = self.built.lock().unwrap_or_else(PoisonError::into_inner);
        let name = format!("{}", built.len() + 1);
        built.insert(name.clone(), image);
        Ok(name)
    }
}

fn status(error: &BuildError) -> Status {
    Status::unknown(match error {
        BuildError::Command { command, code } => {
            format!("process \"{command}\" did not complete successfully: exit code: {code}")
        }
        other => with_causes(other),
    })
}

/// Fetches what a build is made of.
struct Fetching<'a> {
    job: &'a Job,
    sessions: &'a Sessions,
    directories: &'a Directories,
    session: &'a Session,
    /// What is gone with the build lies below.
    dir: &'a Path,
    /// What stays for the next.
    kept: Vec<Kept>,
}

impl Fetching<'_> {
    /// Returns where the context lies.
    async fn all(&mut self, mut asked: Asked) -> Result<(PathBuf, skep_engine::BuildOptions), Status> {
        let mut options = std::mem::take(&mut asked.options);
        if let Some(given) = &self.job.given {
            skep_engine::check_dockerfile(given.path(), &options.dockerfile).map_err(|error| status(&error))?;
            return Ok((given.path().to_owned(), options));
        }
        if let Some(dir) = &asked.dockerfile_dir {
            let source = Source::Dir { name: dir.clone(), session: None };
            let step = format!("[internal] load build definition from {}", asked.filename);
            let wanted = vec![asked.filename.clone(), format!("{}{IGNORE_FILE}", asked.filename)];
            options.dockerfile_dir = Some(self.fetch(&source, "dockerfile", &step, wanted, Vec::new()).await?);
        }
        let excluded = match (&asked.context, &options.dockerfile_dir) {
            (Source::Dir { .. }, Some(dir)) => self.excluded(&asked, dir).await?,
            _ => Vec::new(),
        };
        let mut root =
            self.fetch(&asked.context, "context", "[internal] load build context", Vec::new(), excluded).await?;
        if !asked.subdir.is_empty() {
            let sub = root.join(asked.subdir.trim_start_matches('/')).canonicalize();
            let inside = sub.ok().filter(|sub| root.canonicalize().is_ok_and(|root| sub.starts_with(root)));
            root = inside
                .ok_or_else(|| Status::invalid_argument(format!("the context has no directory {}", asked.subdir)))?;
        }
        for (number, (name, source)) in asked.named.iter().enumerate() {
            let context = match source {
                Source::Image(image) => NamedContext::Image(image.clone()),
                source => {
                    let step = format!("[context {name}] load from client");
                    let dir = self.fetch(source, &format!("named-{number}"), &step, Vec::new(), Vec::new()).await?;
                    NamedContext::Files(dir)
                }
            };
            options.contexts.insert(name.clone(), context);
        }
        let dockerfile_dir = options.dockerfile_dir.as_deref().unwrap_or(&root);
        skep_engine::check_dockerfile(dockerfile_dir, &options.dockerfile).map_err(|error| status(&error))?;
        Ok((root, options))
    }

    /// What the context leaves out, so that the client need not send it.
    async fn excluded(&mut self, asked: &Asked, dockerfile_dir: &Path) -> Result<Vec<String>, Status> {
        let own = format!("{}{IGNORE_FILE}", asked.filename);
        if let Ok(patterns) = skep_engine::ignored_patterns(dockerfile_dir, &own) {
            return Ok(patterns);
        }
        let step = "[internal] load .dockerignore";
        let dir = self.fetch(&asked.context, "ignore", step, vec![IGNORE_FILE.into()], Vec::new()).await?;
        // There need be none.
        Ok(skep_engine::ignored_patterns(&dir, IGNORE_FILE).unwrap_or_default())
    }

    async fn fetch(
        &mut self,
        source: &Source,
        into: &str,
        step: &str,
        paths: Vec<String>,
        excluded: Vec<String>,
    ) -> Result<PathBuf, Status> {
        let own = self.job.progress.begin(step);
        let dir = self.place(source, into, paths.is_empty());
        let fetched = match std::fs::create_dir_all(&dir) {
            Ok(()) => self.fetch_into(source, &dir, own, paths, excluded).await,
            Err(error) => Err(Status::internal(format!("{}: {error}", dir.display()))),
        };
        if fetched.is_err() {
            // What is there may be what fills the disk.
            let partial = dir.clone();
            drop(tokio::task::spawn_blocking(move || std::fs::remove_dir_all(partial)).await);
        }
        self.job.progress.finish(own, fetched.as_ref().err().map(Status::message));
        fetched
    }

    /// Where files are fetched to: where they were the last time, if all of a directory is wanted.
    fn place(&mut self, source: &Source, into: &str, is_whole: bool) -> PathBuf {
        let kept = match source {
            Source::Dir { name, session: None } if is_whole => self.directories.take(&self.session.shared_key, name),
            _ => None,
        };
        let path = kept.as_ref().map_or_else(|| self.dir.join(into), |kept| kept.path().to_owned());
        self.kept.extend(kept);
        path
    }

    async fn fetch_into(
        &mut self,
        source: &Source,
        dir: &Path,
        step: OwnStep,
        paths: Vec<String>,
        excluded: Vec<String>,
    ) -> Result<PathBuf, Status> {
        match source {
            Source::Dir { name, session } => {
                let other = match session {
                    Some(id) => Some(self.sessions.get(id).await?),
                    None => None,
                };
                let session = other.as_ref().unwrap_or(self.session);
                let bytes = Arc::new(AtomicU64::new(0));
                let wanted = Wanted { dir: name, paths, excluded };
                let receiving = files::receive(session, wanted, dir, bytes.clone());
                let line = format!("transferring {name}:");
                self.counting(step, &line, &bytes, receiving).await.map(|()| dir.to_owned())
            }
            Source::Upload(path) => {
                let bytes = Arc::new(AtomicU64::new(0));
                self.counting(step, "transferring context:", &bytes, upload(self.session, path, dir, bytes.clone()))
                    .await
                    .map(|()| dir.to_owned())
            }
            Source::Url(url) => {
                let fetched = remote::fetch(url, dir).await.map_err(Status::invalid_argument)?;
                Ok(fetched.root)
            }
            Source::Image(image) => {
                Err(Status::invalid_argument(format!("the image {image} is no directory of files")))
            }
        }
    }

    /// Shows how much has come while something comes.
    async fn counting<T>(
        &self,
        step: OwnStep,
        line: &str,
        bytes: &AtomicU64,
        coming: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, Status> {
        tokio::pin!(coming);
        let mut every = tokio::time::interval(NOTE_EVERY);
        loop {
            tokio::select! {
                come = &mut coming => {
                    self.job.progress.note(step, line, bytes.load(Ordering::Relaxed), true);
                    return come;
                }
                _ = every.tick() => self.job.progress.note(step, line, bytes.load(Ordering::Relaxed), false),
            }
        }
    }
}

/// Unpacks an archive that the client read from its input.
async fn upload(session: &Session, path: &str, into: &Path, bytes: Arc<AtomicU64>) -> Result<(), Status> {
    let mut request = tonic::Request::new(tokio_stream::pending::<BytesMessage>());
    let value = |text: &str| text.parse().map_err(|_| Status::invalid_argument(format!("{text:?} is no upload")));
    request.metadata_mut().insert("urlpath", value(path)?);
    request.metadata_mut().insert("urlhost", value("buildkit-session")?);
    let (channel, origin) = session.channel();
    let mut pieces = UploadClient::with_origin(channel, origin).pull(request).await?.into_inner();
    let (reader, mut writer) = tokio::io::duplex(1 << 20);
    let dir = into.to_owned();
    let unpacking = tokio::task::spawn_blocking(move || {
        skep_engine::unpack_context(tokio_util::io::SyncIoBridge::new(reader), &dir)
    });
    let feeding = async {
        while let Some(piece) = pieces.message().await? {
            bytes.fetch_add(piece.data.len() as u64, Ordering::Relaxed);
            // Who unpacks says what is wrong; what follows the archive's end is of no use.
            if tokio::io::AsyncWriteExt::write_all(&mut writer, &piece.data).await.is_err() {
                break;
            }
        }
        drop(writer);
        Ok::<_, Status>(())
    };
    feeding.await?;
    let unpacked = unpacking.await.map_err(|error| Status::internal(error.to_string()))?;
    unpacked.map_err(|error| Status::invalid_argument(format!("the build's context: {}", with_causes(&error))))
}
