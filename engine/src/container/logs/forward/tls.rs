//! TLS to those who take lines.

use std::io::{self, Read as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde::{Deserialize, Serialize};
use skep_pki::AnyServer;

/// Whom we trust, and who we are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Tls {
    /// The name that the server's certificate must have.
    pub server: String,
    /// A file of those who may have signed it; none: those that this host trusts.
    pub authorities: Option<PathBuf>,
    /// Files of our own certificate and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Whether any certificate will do.
    pub trusts_any: bool,
}

/// Opens the file, and says which if it cannot be used.
fn read<T>(path: &Path, parse: impl FnOnce(&[u8]) -> Result<T, rustls::pki_types::pem::Error>) -> io::Result<T> {
    const LEN_MAX: u64 = 4 << 20;
    let mut bytes = Vec::new();
    let opened = std::fs::File::open(path).and_then(|file| file.take(LEN_MAX).read_to_end(&mut bytes));
    opened.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
    parse(&bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {error}", path.display())))
}

fn certificates(path: &Path) -> io::Result<Vec<CertificateDer<'static>>> {
    read(path, |bytes| CertificateDer::pem_slice_iter(bytes).collect())
}

impl Tls {
    /// To the server at `HOST:PORT`, by what this host trusts.
    pub(super) fn of(address: &str) -> Self {
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
        Self { server: host.trim_matches(['[', ']']).to_owned(), ..Self::default() }
    }

    fn config(&self) -> io::Result<ClientConfig> {
        let provider = Arc::new(ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions();
        let builder = builder.map_err(io::Error::other)?;
        let builder = if self.trusts_any {
            builder.dangerous().with_custom_certificate_verifier(AnyServer::new(provider))
        } else {
            let mut roots = RootCertStore::empty();
            match &self.authorities {
                Some(path) => roots.add_parsable_certificates(certificates(path)?),
                None => roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs),
            };
            builder.with_root_certificates(roots)
        };
        let Some((certificate, key)) = &self.identity else { return Ok(builder.with_no_client_auth()) };
        let key = read(key, PrivateKeyDer::from_pem_slice)?;
        builder.with_client_auth_cert(certificates(certificate)?, key).map_err(io::Error::other)
    }
}

/// Agrees on keys with whoever is at the other end, and checks who that is.
pub(super) fn agree(mut socket: TcpStream, tls: &Tls) -> io::Result<StreamOwned<ClientConnection, TcpStream>> {
    let name = ServerName::try_from(tls.server.clone()).map_err(io::Error::other)?;
    let mut connection = ClientConnection::new(Arc::new(tls.config()?), name).map_err(io::Error::other)?;
    while connection.is_handshaking() {
        connection.complete_io(&mut socket)?;
    }
    Ok(StreamOwned::new(connection, socket))
}
