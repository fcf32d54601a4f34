//! Name constraints of authorities (RFC 5280, 4.2.1.10): host names and directory names are compared; a name of another kind is refused
//! where an authority constrains names of its kind.

use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::{GeneralName, GeneralSubtree, NameConstraints, ParsedExtension};
use x509_parser::prelude::FromDer as _;

use super::{Certificate, names};

/// What an authority allows the certificates below it to be called.
#[derive(Debug, Clone)]
pub(super) struct Constraints {
    permitted: Vec<Name>,
    excluded: Vec<Name>,
}

/// A name in the form in which names are compared.
#[derive(Debug, Clone, PartialEq)]
enum Name {
    /// In lower case.
    Host(String),
    /// Its parts as text in lower case, the first one first.
    Directory(Vec<String>),
    /// The number of its kind.
    Other(u8),
}

impl Constraints {
    pub(super) fn new(constraints: &NameConstraints<'_>) -> Self {
        let read = |subtrees: &Option<Vec<GeneralSubtree<'_>>>| subtrees.iter().flatten().map(|subtree| Name::new(&subtree.base)).collect();
        Self { permitted: read(&constraints.permitted_subtrees), excluded: read(&constraints.excluded_subtrees) }
    }

    /// Whether all names of the certificate are within. Constraints are rare, so it is parsed again rather than carry its names along.
    pub(super) fn allow(&self, certificate: &Certificate) -> bool {
        names_of(&certificate.der).is_some_and(|names| names.iter().all(|name| self.allows(name)))
    }

    fn allows(&self, name: &Name) -> bool {
        let mut permitted = self.permitted.iter().filter(|subtree| subtree.is_of_kind(name)).peekable();
        let within = permitted.peek().is_none() || permitted.any(|subtree| name.lies_within(subtree) == Some(true));
        let excluded = self.excluded.iter().any(|subtree| subtree.is_of_kind(name) && name.lies_within(subtree) != Some(false));
        within && !excluded
    }
}

fn names_of(der: &[u8]) -> Option<Vec<Name>> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let mut found = Vec::new();
    if certificate.subject().iter_rdn().next().is_some() {
        found.push(Name::Directory(names::parts(certificate.subject())));
    }
    for extension in certificate.extensions() {
        if let ParsedExtension::SubjectAlternativeName(names) = extension.parsed_extension() {
            found.extend(names.general_names.iter().map(Name::new));
        }
    }
    Some(found)
}

impl Name {
    fn new(name: &GeneralName<'_>) -> Self {
        match name {
            GeneralName::DNSName(host) => Self::Host(host.to_ascii_lowercase()),
            GeneralName::DirectoryName(name) => Self::Directory(names::parts(name)),
            GeneralName::OtherName(..) => Self::Other(0),
            GeneralName::RFC822Name(_) => Self::Other(1),
            GeneralName::X400Address(_) => Self::Other(3),
            GeneralName::EDIPartyName(_) => Self::Other(5),
            GeneralName::URI(_) => Self::Other(6),
            GeneralName::IPAddress(_) => Self::Other(7),
            GeneralName::RegisteredID(_) => Self::Other(8),
            GeneralName::Invalid(tag, _) => Self::Other(u8::try_from(tag.0).unwrap_or(u8::MAX)),
        }
    }

    fn kind(&self) -> u8 {
        match self {
            Self::Host(_) => 2,
            Self::Directory(_) => 4,
            Self::Other(kind) => *kind,
        }
    }

    fn is_of_kind(&self, other: &Self) -> bool {
        self.kind() == other.kind()
    }

    /// `None` where that is not known.
    fn lies_within(&self, subtree: &Self) -> Option<bool> {
        match (self, subtree) {
            (Self::Host(host), Self::Host(zone)) => {
                let zone = zone.strip_prefix('.').unwrap_or(zone);
                let above = host.strip_suffix(zone);
                Some(zone.is_empty() || above.is_some_and(|above| above.is_empty() || above.ends_with('.')))
            }
            (Self::Directory(name), Self::Directory(subtree)) => Some(name.starts_with(subtree)),
            _ => None,
        }
    }
}
