//! The root certificate authority.

use std::fmt;
use std::time::{Duration, SystemTime};

use num_bigint::BigUint;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SerialNumber,
};
use sha2::{Digest as _, Sha256};
use skep_api::{ClusterId, NodeId, NodeRole, SecretBytes};

/// The life of a root certificate.
const ROOT_LIFE: Duration = Duration::from_secs(20 * 365 * 24 * 3600);
/// Certificates are valid from an hour ago, so that clocks may differ by so much.
const BACKDATE: Duration = Duration::from_secs(3600);
/// The largest certificate request that is read, in bytes.
const CSR_LEN_MAX: usize = 16 << 10;

/// SHA-256 of a root certificate's PEM text: what a join token pins.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct CaDigest(pub [u8; 32]);

impl CaDigest {
    #[must_use]
    pub fn of_pem(pem: &str) -> Self {
        Self(Sha256::digest(pem.as_bytes()).into())
    }
}

impl fmt::Display for CaDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:0>50}", BigUint::from_bytes_be(&self.0).to_str_radix(36))
    }
}

impl fmt::Debug for CaDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why the authority did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    #[error("the swarm's root certificate or key cannot be used")]
    Root(#[source] rcgen::Error),
    #[error("the certificate request cannot be read or is not signed by its own key")]
    Request(#[source] rcgen::Error),
    #[error("the certificate request has {0} bytes, at most {CSR_LEN_MAX} are read")]
    RequestTooLarge(usize),
    #[error("the certificate could not be made")]
    Sign(#[source] rcgen::Error),
}

/// What a certificate says of its holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subject {
    pub node: NodeId,
    pub role: NodeRole,
    pub cluster: ClusterId,
}

/// The name that a node's certificate answers to besides its role; an id of digits alone would be
/// no DNS name.
#[must_use]
pub fn tls_name(node: NodeId) -> String {
    format!("node-{node}")
}

/// The root CA with its key: can sign.
pub struct RootAuthority {
    certificate_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl fmt::Debug for RootAuthority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RootAuthority").field("digest", &self.digest()).finish_non_exhaustive()
    }
}

impl RootAuthority {
    /// Makes a new root; returns it with its key for the swarm to keep.
    pub fn generate(now: SystemTime) -> Result<(Self, SecretBytes), CaError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(CaError::Root)?;
        let key_pem = SecretBytes::new(key.serialize_pem().into_bytes());
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "swarm-ca");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = (now - BACKDATE).into();
        params.not_after = (now + ROOT_LIFE).into();
        let certificate = params.self_signed(&key).map_err(CaError::Root)?;
        let root = Self::load(&certificate.pem(), &key_pem)?;
        Ok((root, key_pem))
    }

    /// Takes up a root that was made before.
    pub fn load(certificate_pem: &str, key_pem: &SecretBytes) -> Result<Self, CaError> {
        let text = String::from_utf8_lossy(key_pem.expose());
        let key = KeyPair::from_pem(&text).map_err(CaError::Root)?;
        let issuer = Issuer::from_ca_cert_pem(certificate_pem, key).map_err(CaError::Root)?;
        Ok(Self { certificate_pem: certificate_pem.to_owned(), issuer })
    }

    #[must_use]
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    #[must_use]
    pub fn digest(&self) -> CaDigest {
        CaDigest::of_pem(&self.certificate_pem)
    }

    /// Signs the key of a request, for `subject`. All else that the request asks for is ignored.
    pub fn sign(&self, csr_pem: &str, subject: Subject, life: Duration, now: SystemTime) -> Result<String, CaError> {
        if csr_pem.len() > CSR_LEN_MAX {
            return Err(CaError::RequestTooLarge(csr_pem.len()));
        }
        let request = CertificateSigningRequestParams::from_pem(csr_pem).map_err(CaError::Request)?;
        let unit = subject.role.organizational_unit();
        let names = vec![unit.to_owned(), subject.node.to_string(), tls_name(subject.node)];
        let mut params = CertificateParams::new(names).map_err(CaError::Sign)?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, subject.cluster.to_string());
        params.distinguished_name.push(DnType::OrganizationalUnitName, unit);
        params.distinguished_name.push(DnType::CommonName, subject.node.to_string());
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(SerialNumber::from_slice(&rand::random::<[u8; 16]>()));
        params.not_before = (now - BACKDATE).into();
        params.not_after = (now + life).into();
        let certificate = params.signed_by(&request.public_key, &self.issuer).map_err(CaError::Sign)?;
        Ok(certificate.pem())
    }
}
