//! What a build comes to: an image here, or files that the client takes.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{self, Read as _, Write};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use axum::http::uri::PathAndQuery;
use skep_api::buildkit::session::packet::Type;
use skep_api::buildkit::session::{Packet, Stat};
use skep_api::buildkit::upload::BytesMessage;
use skep_api::buildkit::{Exporter, SolveRequest};
use skep_api::with_causes;
use skep_engine::Image;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codec::Streaming;
use tonic::{Status, client};
use tonic_prost::ProstCodec;
use tonic_prost::prost::Message;

use super::Served;
use super::files::go_mode;
use super::job::Job;
use super::progress::OwnStep;
use super::session::Session;

/// What a packet carries of a file.
const PIECE_LEN: usize = 32 << 10;
const PIECES_AHEAD: usize = 64;
/// How clients take files and archives alike.
const SEND: &str = "/moby.filesync.v1.FileSend/DiffCopy";

/// What is wanted of a build.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Output {
    /// An image here, with these names.
    Image(Vec<String>),
    /// The image's files, in a directory of the client's.
    Directory,
    /// An archive of them.
    Archive,
    /// Nothing that is kept, but the image without a name.
    Nothing,
}

impl Output {
    pub(super) fn read(request: &SolveRequest) -> Result<Self, Status> {
        let old = (!request.exporter.is_empty())
            .then(|| Exporter { kind: request.exporter.clone(), attrs: request.exporter_attrs.clone() });
        let exporter = match request.exporters.as_slice() {
            [] => old,
            [one] => Some(one.clone()),
            _ => return Err(Status::unimplemented("a build has one output here: give one --output")),
        };
        let Some(exporter) = exporter else { return Ok(Self::Nothing) };
        let names = exporter.attrs.get("name").map(String::as_str).unwrap_or_default();
        let names: Vec<_> = names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect();
        if let Some(wrong) = names.iter().find(|name| skep_engine::normalize(name).is_none()) {
            return Err(Status::invalid_argument(format!(
                "invalid reference format: {wrong:?} is no name of an image"
            )));
        }
        match exporter.kind.as_str() {
            "" => Ok(Self::Nothing),
            "moby" | "image" => Ok(Self::Image(names)),
            "local" => Ok(Self::Directory),
            "tar" => Ok(Self::Archive),
            other => Err(Status::unimplemented(format!(
                "--output type={other} is not supported by this builder: use image, local or tar"
            ))),
        }
    }

    /// What the client is told of the image that it came to.
    fn told(&self, image: &Image) -> HashMap<String, String> {
        let Self::Image(names) = self else { return HashMap::new() };
        let mut told = HashMap::from([
            ("containerimage.digest".to_owned(), image.id.clone()),
            ("containerimage.config.digest".to_owned(), image.id.clone()),
        ]);
        if !names.is_empty() {
            told.insert("image.name".to_owned(), names.join(","));
        }
        told
    }
}

impl Served {
    /// Hands over what was built; returns what the client is told of it.
    pub(super) async fn hand_over(
        &self,
        job: &Job,
        image: &Image,
        output: &Output,
    ) -> Result<HashMap<String, String>, Status> {
        let (what, line) = match output {
            Output::Image(_) => ("exporting to image", "exporting layers"),
            Output::Directory => ("exporting to client directory", "copying files"),
            Output::Archive => ("exporting to client tarball", "sending tarball"),
            Output::Nothing => return Ok(HashMap::new()),
        };
        let step = job.progress.begin(what);
        job.progress.note(step, line, 0, false);
        let handed = self.give(job, image, output, step).await;
        job.progress.note(step, line, 0, true);
        job.progress.finish(step, handed.as_ref().err().map(Status::message));
        handed
    }

    async fn give(
        &self,
        job: &Job,
        image: &Image,
        output: &Output,
        step: OwnStep,
    ) -> Result<HashMap<String, String>, Status> {
        let engine = &self.daemon.engine;
        let session = async || self.kit().sessions.get(&job.session).await;
        let files = || engine.image_files(image).map_err(|error| Status::internal(with_causes(&error)));
        match output {
            Output::Nothing => {}
            Output::Image(names) => {
                job.progress.note(step, &format!("writing image {}", image.id), 0, true);
                for name in names {
                    engine.tag(&image.id, name).map_err(|error| Status::invalid_argument(error.to_string()))?;
                    let full = skep_engine::normalize(name).unwrap_or_default();
                    job.progress.note(step, &format!("naming to {full}"), 0, true);
                }
            }
            Output::Directory => {
                let files = files()?;
                send_files(&session().await?, files.root()).await?;
            }
            Output::Archive => {
                let files = files()?;
                send_archive(&session().await?, move |to| files.archive(to)).await?;
            }
        }
        Ok(output.told(image))
    }
}

/// Calls the client to take what comes by `messages`.
async fn call<Out, In>(session: &Session, messages: mpsc::Receiver<Out>) -> Result<Streaming<In>, Status>
where
    Out: Message + 'static,
    In: Message + Default + 'static,
{
    if !session.serves(SEND) {
        return Err(Status::failed_precondition("the client takes no files: it is to say where they go"));
    }
    let (channel, origin) = session.channel();
    let mut grpc = client::Grpc::with_origin(channel, origin);
    grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let codec: ProstCodec<Out, In> = ProstCodec::default();
    let request = tonic::Request::new(ReceiverStream::new(messages));
    Ok(grpc.streaming(request, PathAndQuery::from_static(SEND), codec).await?.into_inner())
}

/// Sends what `write` writes.
async fn send_archive(
    session: &Session,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()> + Send + 'static,
) -> Result<(), Status> {
    let (pieces, coming) = mpsc::channel(PIECES_AHEAD);
    let writing = tokio::task::spawn_blocking(move || {
        let mut to = io::BufWriter::with_capacity(PIECE_LEN, Pieces(pieces));
        write(&mut to)?;
        to.flush()
    });
    // The client says nothing before something has come.
    let mut taken = call::<BytesMessage, BytesMessage>(session, coming).await?;
    let written = writing.await.map_err(|error| Status::internal(error.to_string()))?;
    // Why the client takes no more is for it to say.
    while taken.message().await?.is_some() {}
    written.map_err(|error| Status::internal(with_causes(&error)))
}

struct Pieces(mpsc::Sender<BytesMessage>);

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = BytesMessage { data: bytes.to_vec() };
        self.0.blocking_send(piece).map(|()| bytes.len()).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Sends the files below a directory; the client asks for the content of those that it wants.
async fn send_files(session: &Session, root: PathBuf) -> Result<(), Status> {
    let (packets, coming) = mpsc::channel(PIECES_AHEAD);
    // No more can be asked for than were listed.
    let (asking, wanted) = std::sync::mpsc::channel();
    let sending =
        tokio::task::spawn_blocking(move || Sender { root, packets, files: BTreeMap::new(), listed: 0 }.send(&wanted));
    let mut asked = call::<Packet, Packet>(session, coming).await?;
    while let Some(packet) = asked.message().await? {
        match packet.r#type() {
            Type::Req | Type::Fin => drop(asking.send((packet.r#type() == Type::Req).then_some(packet.id))),
            Type::Err => return Err(Status::unknown(String::from_utf8_lossy(&packet.data).into_owned())),
            Type::Stat | Type::Data => {}
        }
    }
    drop(asking);
    let sent = sending.await.map_err(|error| Status::internal(error.to_string()))?;
    sent.map_err(|error| Status::internal(with_causes(&error)))
}

/// Lists files and sends those that are asked for.
struct Sender {
    root: PathBuf,
    packets: mpsc::Sender<Packet>,
    files: BTreeMap<u32, PathBuf>,
    listed: u32,
}

impl Sender {
    fn send(mut self, wanted: &std::sync::mpsc::Receiver<Option<u32>>) -> io::Result<()> {
        self.list(Path::new(""))?;
        self.tell(Packet::default())?;
        while let Ok(Some(number)) = wanted.recv() {
            let unknown = || io::Error::new(io::ErrorKind::InvalidData, "the client asked for what was not listed");
            let mut file = fs::File::open(self.files.remove(&number).ok_or_else(unknown)?)?;
            let mut buffer = vec![0; PIECE_LEN];
            loop {
                let len = file.read(&mut buffer)?;
                // The last one is empty.
                let data = buffer[..len].to_vec();
                self.tell(Packet { r#type: Type::Data.into(), id: number, data, ..Packet::default() })?;
                if len == 0 {
                    break;
                }
            }
        }
        self.tell(Packet { r#type: Type::Fin.into(), ..Packet::default() })
    }

    fn tell(&self, packet: Packet) -> io::Result<()> {
        self.packets.blocking_send(packet).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    /// Directories come before what is in them; what is no file, directory or link stays.
    fn list(&mut self, dir: &Path) -> io::Result<()> {
        let mut names: Vec<_> = fs::read_dir(self.root.join(dir))?.flatten().map(|entry| entry.file_name()).collect();
        names.sort();
        for name in names {
            let path = dir.join(name);
            let full = self.root.join(&path);
            let meta = fs::symlink_metadata(&full)?;
            let Some(mode) = go_mode(&meta) else { continue };
            let link = if meta.is_symlink() { fs::read_link(&full)? } else { PathBuf::new() };
            let stat = Stat {
                path: path.to_string_lossy().into_owned(),
                mode,
                uid: meta.uid(),
                gid: meta.gid(),
                size: i64::try_from(meta.len()).unwrap_or(i64::MAX),
                modified: meta.mtime().saturating_mul(1_000_000_000).saturating_add(meta.mtime_nsec()),
                link: link.to_string_lossy().into_owned(),
                ..Stat::default()
            };
            self.tell(Packet { stat: Some(stat), ..Packet::default() })?;
            if meta.is_file() {
                self.files.insert(self.listed, full);
            }
            self.listed += 1;
            if meta.is_dir() {
                self.list(&path)?;
            }
        }
        Ok(())
    }
}
