//! Downloads of layers: broken off, they go on where they were.

use std::io::{self, SeekFrom};
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::BoxStream;
use oci_client::client::BlobResponse;
use oci_client::errors::OciDistributionError;
use oci_client::manifest::OciDescriptor;
use oci_client::{Client, Reference};
use sha2::{Digest as _, Sha256};
use skep_api::with_causes;
use tokio::fs::File;
use tokio::io::{AsyncSeekExt as _, AsyncWriteExt as _};

/// How often a download that brings nothing more is tried again.
const TRIES_MAX: u32 = 5;
const PAUSE: Duration = Duration::from_millis(500);
/// How long a registry may send nothing of what it began to send.
const STALL_LIMIT: Duration = Duration::from_secs(30);

/// Why a layer was not downloaded.
#[derive(Debug, thiserror::Error)]
pub(super) enum DownloadError {
    #[error(transparent)]
    Registry(#[from] OciDistributionError),
    #[error("the download of layer {digest} broke off {TRIES_MAX} times without going on, last: {reason}")]
    Broken { digest: String, reason: String },
    #[error("layer {digest} is damaged: {reason}")]
    Damaged { digest: String, reason: String },
    #[error("the layer cannot be written")]
    Disk(#[source] io::Error),
}

/// A layer on its way into a file.
pub(super) struct Download<'a> {
    client: &'a Client,
    place: &'a Reference,
    layer: &'a OciDescriptor,
    file: &'a mut File,
    hash: Sha256,
    done: u64,
}

type Chunks = BoxStream<'static, io::Result<bytes::Bytes>>;

impl<'a> Download<'a> {
    pub(super) fn new(client: &'a Client, place: &'a Reference, layer: &'a OciDescriptor, file: &'a mut File) -> Self {
        Self { client, place, layer, file, hash: Sha256::new(), done: 0 }
    }

    /// Brings the layer into the file and checks its digest; returns its length. `tell` hears how many bytes there are.
    pub(super) async fn run(mut self, tell: impl Fn(u64)) -> Result<u64, DownloadError> {
        let mut tries = 0;
        loop {
            let before = self.done;
            let ended = match self.chunks().await {
                Ok(chunks) => self.take(chunks, &tell).await?,
                // Nothing has come yet: what is wrong is not on the way.
                Err(DownloadError::Registry(error)) if self.done == 0 => return Err(error.into()),
                Err(DownloadError::Registry(error)) => Err(with_causes(&error)),
                Err(other) => return Err(other),
            };
            let reason = match ended {
                Ok(()) if self.is_whole() => return self.finish().await,
                Ok(()) => "the connection was closed".to_owned(),
                // Such as a digest that is not right: what comes of the check here is told.
                Err(_) if self.is_whole() => return self.finish().await,
                Err(reason) => reason,
            };
            tries = if self.done > before { 1 } else { tries + 1 };
            if tries > TRIES_MAX {
                return Err(DownloadError::Broken { digest: self.layer.digest.clone(), reason });
            }
            tracing::debug!(layer = self.layer.digest, at = self.done, reason, "a download broke off and goes on");
            tokio::time::sleep(PAUSE * tries).await;
        }
    }

    /// What is left of the layer; all of it anew from registries that do not send parts.
    async fn chunks(&mut self) -> Result<Chunks, DownloadError> {
        if self.done == 0 {
            return Ok(self.client.pull_blob_stream(self.place, self.layer).await?.stream);
        }
        match self.client.pull_blob_stream_partial(self.place, self.layer, self.done, None).await? {
            BlobResponse::Partial(rest) => Ok(rest.stream),
            BlobResponse::Full(all) => {
                self.file.set_len(0).await.map_err(DownloadError::Disk)?;
                self.file.seek(SeekFrom::Start(0)).await.map_err(DownloadError::Disk)?;
                (self.hash, self.done) = (Sha256::new(), 0);
                Ok(all.stream)
            }
        }
    }

    /// Takes what comes, until it ends or, which is the inner error, breaks off.
    async fn take(&mut self, mut chunks: Chunks, tell: &impl Fn(u64)) -> Result<Result<(), String>, DownloadError> {
        loop {
            let chunk = match tokio::time::timeout(STALL_LIMIT, chunks.next()).await {
                Err(_) => return Ok(Err(format!("nothing came for {STALL_LIMIT:?}"))),
                Ok(None) => return Ok(Ok(())),
                Ok(Some(Err(error))) => return Ok(Err(with_causes(&error))),
                Ok(Some(Ok(chunk))) => chunk,
            };
            self.file.write_all(&chunk).await.map_err(DownloadError::Disk)?;
            self.hash.update(&chunk);
            self.done += chunk.len() as u64;
            if self.len().is_some_and(|len| self.done > len) {
                return Err(self.damaged(format!("more than the {} bytes that its manifest tells", self.layer.size)));
            }
            tell(self.done);
        }
    }

    /// As the manifest has it, if it does.
    fn len(&self) -> Option<u64> {
        u64::try_from(self.layer.size).ok().filter(|&len| len > 0)
    }

    fn is_whole(&self) -> bool {
        self.len().is_none_or(|len| self.done == len)
    }

    async fn finish(self) -> Result<u64, DownloadError> {
        let found = format!("sha256:{}", hex::encode(self.hash.clone().finalize()));
        if found != self.layer.digest {
            return Err(self.damaged(format!("what came has the digest {found}")));
        }
        self.file.flush().await.map_err(DownloadError::Disk)?;
        Ok(self.done)
    }

    fn damaged(&self, reason: String) -> DownloadError {
        DownloadError::Damaged { digest: self.layer.digest.clone(), reason }
    }
}
