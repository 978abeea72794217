//! The root certificate authority.

use std::fmt;
use std::time::{Duration, SystemTime};

use base64::prelude::{BASE64_STANDARD, Engine as _};
use num_bigint::BigUint;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType, DnValue,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
    PublicKeyData as _, SerialNumber,
};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use sha2::{Digest as _, Sha256};
use skep_api::{ClusterId, NodeId, NodeRole, SecretBytes, Timestamp};
use x509_parser::der_parser::asn1_rs::Tag;
use x509_parser::extensions::ParsedExtension;
use x509_parser::prelude::{FromDer as _, X509Certificate};
use x509_parser::time::ASN1Time;

/// The life of a root certificate.
const ROOT_LIFE: Duration = Duration::from_secs(20 * 365 * 24 * 3600);
/// Certificates are valid from an hour ago, so that clocks may differ by so much.
const BACKDATE: Duration = Duration::from_secs(3600);
/// The largest certificate or request for one that is read, in bytes.
const PEM_LEN_MAX: usize = 16 << 10;

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
    #[error("the certificate request has {0} bytes, at most {PEM_LEN_MAX} are read")]
    RequestTooLarge(usize),
    #[error("the certificate could not be made")]
    Sign(#[source] rcgen::Error),
    #[error("the root certificate is not usable: {0}")]
    Unfit(&'static str),
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

fn parse<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, CaError> {
    let parsed = X509Certificate::from_der(der).map_err(|_| CaError::Unfit("it is no X.509 certificate"))?;
    Ok(parsed.1)
}

/// Whom a certificate is of, as it says so itself.
fn name_of(certificate: &X509Certificate<'_>) -> Result<DistinguishedName, CaError> {
    let unfit = || CaError::Unfit("its name is empty, or has parts that are no single text");
    let mut name = DistinguishedName::new();
    for part in certificate.subject().iter() {
        let mut values = part.iter();
        let (Some(value), None) = (values.next(), values.next()) else { return Err(unfit()) };
        let kind = DnType::from_oid(&value.attr_type().iter().ok_or_else(unfit)?.collect::<Vec<_>>());
        let text = value.as_str().map_err(|_| unfit())?;
        match value.attr_value().header.tag() {
            Tag::Utf8String => name.push(kind, text),
            Tag::PrintableString => {
                name.push(kind, DnValue::PrintableString(text.try_into().map_err(|_| unfit())?));
            }
            _ => return Err(unfit()),
        }
    }
    if name.iter().next().is_none() { Err(unfit()) } else { Ok(name) }
}

/// What nodes are told to tell of the root that signed their certificates: its name and public key, DER in base64.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IssuerInfo {
    pub subject: String,
    pub public_key: String,
}

impl IssuerInfo {
    /// Of a certificate of a CA.
    pub fn of_pem(certificate_pem: &str) -> Result<Self, CaError> {
        let der =
            CertificateDer::from_pem_slice(certificate_pem.as_bytes()).map_err(|_| CaError::Unfit("it is not PEM"))?;
        let certificate = parse(&der)?;
        Ok(Self {
            subject: BASE64_STANDARD.encode(certificate.subject().as_raw()),
            public_key: BASE64_STANDARD.encode(certificate.public_key().raw),
        })
    }
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
        let key = read_key(key_pem)?;
        let issuer = Issuer::from_ca_cert_pem(certificate_pem, key).map_err(CaError::Root)?;
        Ok(Self { certificate_pem: certificate_pem.to_owned(), issuer })
    }

    /// Takes up a root that a user brings, which may be anything.
    pub fn import(certificate_pem: &str, key_pem: &SecretBytes, now: SystemTime) -> Result<Self, CaError> {
        if certificate_pem.len() > PEM_LEN_MAX {
            return Err(CaError::Unfit("it is larger than 16 KiB"));
        }
        let der = CertificateDer::pem_slice_iter(certificate_pem.as_bytes()).collect::<Result<Vec<_>, _>>();
        let [der] = <[_; 1]>::try_from(der.map_err(|_| CaError::Unfit("it is not PEM"))?)
            .map_err(|_| CaError::Unfit("exactly one certificate is expected"))?;
        let certificate = parse(&der)?;
        if !certificate.is_ca() {
            return Err(CaError::Unfit("it is not that of a CA"));
        }
        let now_asn1 = ASN1Time::from_timestamp(Timestamp::from_system(now).as_nanos() / 1_000_000_000);
        if !now_asn1.is_ok_and(|now| certificate.validity().is_valid_at(now)) {
            return Err(CaError::Unfit("it is not valid now"));
        }
        name_of(&certificate)?;
        // In one form, for it is compared by its text.
        let root = Self::load(&format!("{}\n", certificate_pem.trim()), key_pem)?;
        if root.issuer.key().subject_public_key_info() != certificate.public_key().raw {
            return Err(CaError::Unfit("the key is another one's"));
        }
        // What it signs has to lead back to it: names are compared byte by byte.
        let signed = CertificateDer::from_pem_slice(root.cross_sign(&root, now)?.as_bytes()).expect("it was just made");
        let signed = parse(&signed)?;
        if [signed.subject().as_raw(), signed.issuer().as_raw()] != [certificate.subject().as_raw(); 2] {
            return Err(CaError::Unfit("its name has a part twice"));
        }
        Ok(root)
    }

    /// Signs another root's key: whoever trusts this root then trusts what the other one signs, if this certificate
    /// comes with it.
    pub fn cross_sign(&self, other: &Self, now: SystemTime) -> Result<String, CaError> {
        let der = CertificateDer::from_pem_slice(other.certificate_pem.as_bytes())
            .map_err(|_| CaError::Unfit("it is not PEM"))?;
        let certificate = parse(&der)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = name_of(&certificate)?;
        let identifier = certificate.extensions().iter().find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::SubjectKeyIdentifier(identifier) => Some(identifier.0.to_vec()),
            _ => None,
        });
        params.key_identifier_method = identifier.map_or(KeyIdMethod::Sha256, KeyIdMethod::PreSpecified);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(SerialNumber::from_slice(&rand::random::<[u8; 16]>()));
        params.not_before = (now - BACKDATE).into();
        params.not_after = (now + ROOT_LIFE).into();
        let certificate = params.signed_by(other.issuer.key(), &self.issuer).map_err(CaError::Sign)?;
        Ok(certificate.pem())
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
        if csr_pem.len() > PEM_LEN_MAX {
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

/// Object identifiers of kinds of keys.
const EC_KEY: &[u64] = &[1, 2, 840, 10_045, 2, 1];
const RSA_KEY: &[u64] = &[1, 2, 840, 113_549, 1, 1, 1];
const P256: &[u64] = &[1, 2, 840, 10_045, 3, 1, 7];
const P384: &[u64] = &[1, 3, 132, 0, 34];

/// A key in whichever of the usual forms it is written: as PKCS #8, or as tools wrote keys of each kind before that.
fn read_key(pem: &SecretBytes) -> Result<KeyPair, CaError> {
    let read = |pkcs8: &[u8]| KeyPair::try_from(pkcs8).map_err(CaError::Root);
    match PrivateKeyDer::from_pem_slice(pem.expose()).map_err(|_| CaError::Unfit("the key is no private key in PEM"))? {
        PrivateKeyDer::Pkcs8(key) => read(key.secret_pkcs8_der()),
        PrivateKeyDer::Pkcs1(key) => read(&as_pkcs8(RSA_KEY, None, key.secret_pkcs1_der())),
        PrivateKeyDer::Sec1(key) => {
            let of_curve = |curve| read(&as_pkcs8(EC_KEY, Some(curve), key.secret_sec1_der()));
            of_curve(P256).or_else(|_| of_curve(P384))
        }
        _ => Err(CaError::Unfit("the key is of a form that is not known")),
    }
}

/// A key of a kind, in the form that says so (RFC 5958).
fn as_pkcs8(kind: &[u64], curve: Option<&[u64]>, key: &[u8]) -> Vec<u8> {
    let oid = |numbers: &[u64]| yasna::models::ObjectIdentifier::from_slice(numbers);
    yasna::construct_der(|writer| {
        writer.write_sequence(|members| {
            members.next().write_u8(0);
            members.next().write_sequence(|algorithm| {
                algorithm.next().write_oid(&oid(kind));
                match curve {
                    Some(curve) => algorithm.next().write_oid(&oid(curve)),
                    None => algorithm.next().write_null(),
                }
            });
            members.next().write_bytes(key);
        });
    })
}
