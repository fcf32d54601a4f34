//! Elements of BER as a tree that can be changed and written again: the lengths around a change are right, unless they are the change.

use fastrand::Rng;

const CONSTRUCTED: u8 = 0x20;
/// Deeper than any certificate's.
const MAX_DEPTH: usize = 24;

/// What certificates and signatures are made of.
const TAGS: [u8; 16] = [0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x0c, 0x17, 0x18, 0x24, 0x30, 0x31, 0x80, 0xa0, 0xa1, 0xa3];

/// One element.
#[derive(Debug, Clone)]
pub struct Node {
    /// One byte, as all tags of certificates and signatures.
    pub tag: u8,
    length: Length,
    body: Body,
}

#[derive(Debug, Clone)]
enum Body {
    Bytes(Vec<u8>),
    Children(Vec<Node>),
}

/// How the length is written.
#[derive(Debug, Clone, Copy)]
enum Length {
    Shortest,
    /// In four bytes, whether it needs them or not.
    Long,
    Indefinite,
    /// One that is not true.
    Lie(u32),
}

impl Node {
    /// The elements, one after the other; `None` where there is anything else.
    pub fn read_all(bytes: &[u8]) -> Option<Vec<Self>> {
        let mut rest = bytes;
        let mut nodes = Vec::new();
        while !rest.is_empty() {
            nodes.push(read(&mut rest, 0)?);
        }
        Some(nodes)
    }

    /// Writes them again.
    pub fn write_all(nodes: &[Self]) -> Vec<u8> {
        let mut out = Vec::new();
        for node in nodes {
            node.write(&mut out);
        }
        out
    }

    /// What lies within.
    pub fn children(&mut self) -> Option<&mut Vec<Self>> {
        match &mut self.body {
            Body::Children(children) => Some(children),
            Body::Bytes(_) => None,
        }
    }

    /// What it holds, if nothing lies within.
    pub fn bytes(&mut self) -> Option<&mut Vec<u8>> {
        match &mut self.body {
            Body::Bytes(bytes) => Some(bytes),
            Body::Children(_) => None,
        }
    }

    fn write(&self, out: &mut Vec<u8>) {
        let content = match &self.body {
            Body::Bytes(bytes) => bytes.clone(),
            Body::Children(children) => Self::write_all(children),
        };
        let length = u32::try_from(content.len()).unwrap_or(u32::MAX);
        out.push(self.tag);
        match self.length {
            Length::Shortest => match content.len() {
                0..=0x7f => out.push(length.to_be_bytes()[3]),
                _ => {
                    let digits: Vec<u8> = length.to_be_bytes().into_iter().skip_while(|byte| *byte == 0).collect();
                    out.push(0x80 | u8::try_from(digits.len()).unwrap_or(4));
                    out.extend(digits);
                }
            },
            Length::Long => {
                out.push(0x84);
                out.extend(length.to_be_bytes());
            }
            Length::Indefinite => out.push(0x80),
            Length::Lie(lie) => {
                out.push(0x84);
                out.extend(lie.to_be_bytes());
            }
        }
        out.extend(content);
        if matches!(self.length, Length::Indefinite) {
            out.extend([0, 0]);
        }
    }

    fn count(&self) -> usize {
        match &self.body {
            Body::Bytes(_) => 1,
            Body::Children(children) => 1 + children.iter().map(Self::count).sum::<usize>(),
        }
    }
}

fn read(rest: &mut &[u8], depth: usize) -> Option<Node> {
    let (&tag, after) = rest.split_first()?;
    let (&first, after) = after.split_first()?;
    if depth > MAX_DEPTH || tag == 0 {
        return None;
    }
    if first == 0x80 {
        let mut within = after;
        let mut children = Vec::new();
        while !within.starts_with(&[0, 0]) {
            children.push(read(&mut within, depth + 1)?);
        }
        *rest = within.get(2..)?;
        return Some(Node { tag, length: Length::Indefinite, body: Body::Children(children) });
    }
    let (length, after) = match first {
        0..=0x7f => (usize::from(first), after),
        0x81..=0x84 => {
            let (digits, after) = after.split_at_checked(usize::from(first & 0x7f))?;
            (digits.iter().fold(0, |length, byte| (length << 8) | usize::from(*byte)), after)
        }
        _ => return None,
    };
    let (content, after) = after.split_at_checked(length)?;
    *rest = after;
    let within = (tag & CONSTRUCTED != 0).then(|| {
        let mut within = content;
        let mut children = Vec::new();
        while !within.is_empty() {
            children.push(read(&mut within, depth + 1)?);
        }
        Some(children)
    });
    let body = within.flatten().map_or_else(|| Body::Bytes(content.to_vec()), Body::Children);
    Some(Node { tag, length: Length::Shortest, body })
}

/// One change to one element; `None` where the input is no BER.
pub(super) fn mutate(input: &[u8], other: &[u8], random: &mut Rng) -> Option<Vec<u8>> {
    let mut nodes = Node::read_all(input).filter(|nodes| !nodes.is_empty())?;
    let foreign = Node::read_all(other).unwrap_or_else(|| nodes.clone());
    let count = nodes.iter().map(Node::count).sum::<usize>();
    let foreign = pick(&foreign, random.usize(..foreign.iter().map(Node::count).sum::<usize>().max(1)));
    change(&mut nodes, &mut random.usize(..count), foreign.as_ref(), random);
    Some(Node::write_all(&nodes))
}

fn pick(nodes: &[Node], mut index: usize) -> Option<Node> {
    for node in nodes {
        if index == 0 {
            return Some(node.clone());
        }
        let count = node.count();
        if index < count {
            return match &node.body {
                Body::Children(children) => pick(children, index - 1),
                Body::Bytes(_) => None,
            };
        }
        index -= count;
    }
    None
}

/// Changes the element at `index`, counted from the outside inwards.
fn change(nodes: &mut Vec<Node>, index: &mut usize, foreign: Option<&Node>, random: &mut Rng) {
    for place in 0..nodes.len() {
        if *index == 0 {
            *index = usize::MAX;
            change_here(nodes, place, foreign, random);
            return;
        }
        *index -= 1;
        if let Some(Body::Children(children)) = nodes.get_mut(place).map(|node| &mut node.body) {
            change(children, index, foreign, random);
            if *index == usize::MAX {
                return;
            }
        }
    }
}

fn change_here(nodes: &mut Vec<Node>, place: usize, foreign: Option<&Node>, random: &mut Rng) {
    let count = nodes.len();
    let Some(node) = nodes.get_mut(place) else { return };
    match random.u8(..11) {
        0 => {
            let copy = node.clone();
            nodes.insert(place, copy);
        }
        1 => {
            nodes.remove(place);
        }
        2 => nodes.swap(place, random.usize(..count)),
        3 => {
            if let Some(foreign) = foreign {
                *node = foreign.clone();
            }
        }
        4 => {
            if let Some(foreign) = foreign {
                nodes.insert(place, foreign.clone());
            }
        }
        5 => node.tag = random.choice(TAGS).unwrap_or(0x30),
        6 => node.length = random.choice([Length::Shortest, Length::Long, Length::Indefinite]).unwrap_or(Length::Long),
        7 => node.length = Length::Lie(random.choice([0, 1, 0x7f, 0x80, 0xffff, 0x7fff_ffff, u32::MAX]).unwrap_or_default()),
        8 => {
            for _ in 0..=random.usize(..20) {
                let inner = node.clone();
                let length = if random.bool() { Length::Shortest } else { Length::Indefinite };
                *node = Node { tag: inner.tag | CONSTRUCTED, length, body: Body::Children(vec![inner]) };
            }
        }
        9 => {
            // A string in pieces.
            if let Some(bytes) = node.bytes().map(std::mem::take) {
                let (first, second) = bytes.split_at(random.usize(..=bytes.len()));
                let piece = |part: &[u8]| Node { tag: node.tag, length: Length::Shortest, body: Body::Bytes(part.to_vec()) };
                *node = Node { tag: node.tag | CONSTRUCTED, length: Length::Indefinite, body: Body::Children(vec![piece(first), piece(second)]) };
            }
        }
        _ => {
            if let Some(bytes) = node.bytes() {
                let at = random.usize(..=bytes.len());
                match random.u8(..4) {
                    0 => bytes.insert(at, random.u8(..)),
                    1 if at < bytes.len() => {
                        bytes.remove(at);
                    }
                    2 => bytes.clear(),
                    _ => {
                        if let Some(byte) = bytes.get_mut(at) {
                            *byte ^= 1 << random.u8(..8);
                        }
                    }
                }
            }
        }
    }
}
