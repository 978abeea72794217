//! TLS 1.3 configurations for both sides, which follow the node's certificate as it is renewed.
//!
//! One setup serves tonic and quinn. A server asks for a certificate but lets a peer without one
//! in, for a node that joins has none: what such a peer may call is decided call by call.

use std::sync::{Arc, Mutex};

use arc_swap::ArcSwap;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme};
use rustls_pki_types::pem::PemObject as _;

use crate::ca::CaDigest;
use crate::identity::NodeIdentity;
use crate::peer::PeerIdentity;

/// Why a configuration could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("a certificate or key is not PEM")]
    Pem(#[from] rustls_pki_types::pem::Error),
    #[error("a certificate or key cannot be used")]
    Rustls(#[from] rustls::Error),
    #[error("the root certificate cannot be used")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
}

/// A node's certificate and root as TLS uses them. Replacing the identity takes effect on the next handshake.
#[derive(Debug)]
pub struct TlsIdentity {
    current: ArcSwap<Current>,
}

#[derive(Debug)]
struct Current {
    identity: NodeIdentity,
    key: Arc<CertifiedKey>,
    /// What others' certificates are checked by.
    clients: Arc<dyn ClientCertVerifier>,
    servers: Arc<WebPkiServerVerifier>,
}

/// No configuration of ours offers it.
const NO_TLS12: rustls::Error = rustls::Error::PeerIncompatible(rustls::PeerIncompatible::Tls12NotOffered);

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn roots(pem: &str) -> Result<Arc<RootCertStore>, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(pem.as_bytes())?)?;
    Ok(Arc::new(roots))
}

impl Current {
    fn new(identity: NodeIdentity) -> Result<Self, TlsError> {
        let chain = CertificateDer::pem_slice_iter(identity.certificate_pem.as_bytes()).collect::<Result<_, _>>()?;
        let key = PrivateKeyDer::from_pem_slice(identity.key_pem.expose())?;
        let key = CertifiedKey::from_der(chain, key, &provider())?;
        let roots = roots(&identity.root_pem)?;
        let clients =
            WebPkiClientVerifier::builder_with_provider(roots.clone(), provider()).allow_unauthenticated().build()?;
        let servers = WebPkiServerVerifier::builder_with_provider(roots, provider()).build()?;
        Ok(Self { identity, key: Arc::new(key), clients, servers })
    }
}

impl TlsIdentity {
    pub fn new(identity: NodeIdentity) -> Result<Arc<Self>, TlsError> {
        Ok(Arc::new(Self { current: ArcSwap::from_pointee(Current::new(identity)?) }))
    }

    /// Puts a renewed certificate, or the same under another root, in place of the one before.
    pub fn replace(&self, identity: NodeIdentity) -> Result<(), TlsError> {
        self.current.store(Arc::new(Current::new(identity)?));
        Ok(())
    }

    #[must_use]
    pub fn identity(&self) -> NodeIdentity {
        self.current.load().identity.clone()
    }

    #[must_use]
    pub fn peer(&self) -> PeerIdentity {
        self.current.load().identity.peer
    }

    /// For a server that nodes of the swarm connect to.
    pub fn server_config(self: &Arc<Self>, alpn: &[&[u8]]) -> Result<ServerConfig, TlsError> {
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(Arc::new(Follower(self.clone())))
            .with_cert_resolver(Arc::new(Follower(self.clone())));
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        // Every connection proves the certificate anew.
        config.send_tls13_tickets = 0;
        Ok(config)
    }

    /// For a connection to another node of the swarm; the name it is connected by is the peer's
    /// role (`swarm-manager`) or id.
    pub fn client_config(self: &Arc<Self>, alpn: &[&[u8]]) -> Result<ClientConfig, TlsError> {
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Follower(self.clone())))
            .with_client_cert_resolver(Arc::new(Follower(self.clone())));
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        config.resumption = Resumption::disabled();
        Ok(config)
    }
}

/// Shows and checks certificates by the identity as it is at each handshake.
#[derive(Debug)]
struct Follower(Arc<TlsIdentity>);

impl ResolvesServerCert for Follower {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.current.load().key.clone())
    }
}

impl ResolvesClientCert for Follower {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.current.load().key.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl ClientCertVerifier for Follower {
    fn offer_client_auth(&self) -> bool {
        true
    }

    fn client_auth_mandatory(&self) -> bool {
        // Who has none yet may ask for one.
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Nodes have one certificate to show, and another root may be in force by the time they do.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.0.current.load().clients.verify_client_cert(end_entity, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(NO_TLS12)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.current.load().clients.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.current.load().clients.supported_verify_schemes()
    }
}

impl ServerCertVerifier for Follower {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let current = self.0.current.load();
        current.servers.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(NO_TLS12)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.current.load().servers.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.current.load().servers.supported_verify_schemes()
    }
}

/// For the first connection of a node that joins: any server certificate is taken for the moment,
/// and kept, so that the caller can check it against the root once its digest matched the token.
pub fn pinned_client_config(alpn: &[&[u8]]) -> Result<(ClientConfig, Arc<SeenServer>), TlsError> {
    let seen = Arc::new(SeenServer { provider: provider(), chain: Mutex::default() });
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(seen.clone())
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    config.resumption = Resumption::disabled();
    Ok((config, seen))
}

/// The certificate that a server showed before its root was known.
#[derive(Debug)]
pub struct SeenServer {
    provider: Arc<CryptoProvider>,
    chain: Mutex<Vec<CertificateDer<'static>>>,
}

impl SeenServer {
    /// Whether the server we talked to is a manager under `root_pem`, and that root has `digest`.
    /// Only then may the connection be trusted with the token.
    pub fn is_manager_of(&self, root_pem: &str, digest: CaDigest, now: UnixTime) -> Result<bool, TlsError> {
        if CaDigest::of_pem(root_pem) != digest {
            return Ok(false);
        }
        let chain = self.chain.lock().expect("nobody panics while holding it").clone();
        let Some((certificate, intermediates)) = chain.split_first() else { return Ok(false) };
        let verifier = WebPkiServerVerifier::builder_with_provider(roots(root_pem)?, provider()).build()?;
        let name = ServerName::try_from("swarm-manager").expect("a valid name");
        Ok(verifier.verify_server_cert(certificate, intermediates, &name, &[], now).is_ok())
    }
}

impl ServerCertVerifier for SeenServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let chain = std::iter::once(end_entity).chain(intermediates).map(|c| c.clone().into_owned());
        *self.chain.lock().expect("nobody panics while holding it") = chain.collect();
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(NO_TLS12)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
