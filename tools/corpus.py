"""The text our tokenizer is trained on: hematology sentences made from templates, written for this project."""

from itertools import product


CELLS = """
red blood cell; white blood cell; platelet; neutrophil; band neutrophil; segmented neutrophil; eosinophil; basophil;
lymphocyte; atypical lymphocyte; lymphocyte variant; immature lymphocyte; monocyte; promonocyte; monoblast; myeloblast;
lymphoblast; blast; blast no lineage; promyelocyte; abnormal promyelocyte; myelocyte; metamyelocyte; erythroblast;
normoblast; proerythroblast; prolymphocyte; plasma cell; hairy cell; smudge cell; faggot cell; giant thrombocyte;
thrombocyte aggregation; abnormal eosinophil; artefact; immature granulocyte; leukocyte; erythrocyte; thrombocyte;
reticulocyte; megakaryocyte; sickle cell; target cell; burr cell; teardrop cell; elliptocyte; ovalocyte; spherocyte;
stomatocyte; schistocyte; macrocyte; microcyte; acanthocyte; echinocyte; hypochromia; gametocyte; schizont; trophozoite;
ring; parasite; plasmodium; leishmania; concentrated leishman parasite; leishman parasite; babesia; toxoplasma; trichomonad;
trypanosome; tubercle bacillus; difficult; none; unidentified; other cell; not identifiable; RBC; WBC; ig; TBbacillus
"""
DISEASES = """
acute lymphoblastic leukemia; acute myeloid leukemia; chronic lymphocytic leukemia; chronic myeloid leukemia; malaria;
sickle cell disease; anemia; iron deficiency; thalassemia; leishmaniasis; tuberculosis; lymphoma; multiple myeloma;
thrombocytopenia; polycythemia; sepsis; infection; inflammation; blood; bone marrow
"""
ATTRIBUTES = {
    "nuclear chromatin": "open; coarse; densely packed; loosely packed; fine; clumped",
    "nuclear shape": "regular; irregular; round; oval; indented; segmented; bilobed; multilobed; band-shaped; kidney-shaped",
    "nucleus": "round; irregular; segmented bilobed; segmented multilobed; unsegmented indented; unsegmented round; "
    "unsegmented band-shaped",
    "nucleolus": "inconspicuous; prominent; single; absent",
    "cytoplasm": "scanty; abundant; clear; frosted; light blue; blue; purple blue; grey; pink; pale; basophilic; granular",
    "basophilia": "slight; moderate; marked",
    "cytoplasmic vacuoles": "absent; present; prominent; few; many",
    "granules": "absent; present; small; round; coarse; fine; pink; purple; red; orange; dark; nil",
    "cell size": "small; big; large; medium; normal",
    "cell shape": "round; irregular; oval; elongated",
    "nuclear to cytoplasmic ratio": "high; low",
    "central pallor": "normal; increased; absent",
}
QUESTIONS = """
What is the {a} of the cell?; What is the {a}?; How does the {a} look?; How would you describe the {a}?; Which {a} is seen?;
Is the {a} {v}?; Describe the {a} of this white blood cell.; What can you say about the {a} in this image?
"""
FIXED_QUESTIONS = """
What type of white blood cell is this?; Which cell class is shown in the image?; What type of cell is shown?; How large is the
white blood cell?; How many white blood cells are in the field?; How many red blood cells are there?; How many platelets can
be seen?; Are there vacuoles in the cytoplasm?; Does the cytoplasm contain vacuoles?; Are granules present in the cytoplasm?;
Is the cell granular?; How do the granules look?; Which colour are the granules?; What is the colour of the granules?; What
type of granules does the cell have?; Which colour does the cytoplasm have?; What is the colour of the cytoplasm?; What is the
texture of the cytoplasm?; How does the cytoplasm texture appear?; How dense is the chromatin?; How is the chromatin packed?;
What is the shape of the nucleus?; How does the nucleus look?; What is the shape of the cell?; How would you describe the
outline of the cell?; Is the nuclear-cytoplasmic ratio high or low?; What is the size of the cell?; Is there a parasite in
this smear?; Is the smear normal?; Is the nucleus regular or irregular?; Is the nucleolus prominent?; Is the cytoplasm scanty
or abundant?; Which cells are present?; Are platelets present?; Is this cell malignant?; What stain was used?; Which is the
most frequent white blood cell?; What disease does this smear suggest?
"""
ANSWERS = """
Yes.; No.; The {a} is {v}.; {V}.; The cell has {v} {a}.; No, the {a} is {v}.; Yes, the {a} is {v}.; The granules are {v}.;
Yes, vacuoles are present.; No, vacuoles are absent.; Yes, granules are present.; No, granules are absent.; There are no
granules.; The chromatin is {v}.; The nucleus is {v}.; The cytoplasm is {v}.; The cell is {v}.
"""
CAPTIONS = """
{C} with {v} {a}.; This image is for the detection of {c} cells; A peripheral blood smear with one {c}.; The field of view shows
several {c} cells.; {C} with densely packed chromatin, irregular nucleus, low nuclear to cytoplasmic ratio and clear light
blue cytoplasm, vacuoles absent, coarse purple granules.; The {c} has {v} {a}, and the cytoplasm is scanty.; {C}.; mask: The
{a} of the {c} is; Q: Is there a {c} in the image?
"""
GENERAL = """
A Wright-Giemsa stained peripheral blood smear at 100x magnification under oil immersion.; The differential count gives 60 %
neutrophils, 30 % lymphocytes, 6 % monocytes, 3 % eosinophils and 1 % basophils.; Hemoglobin 13.5 g/dL, hematocrit 40 %, MCV
90 fL, MCH 30 pg, MCHC 33 g/dL, RDW 13 %, reticulocytes 1 %.; White blood cells 7.5 x 10^9/L; platelets 250 x 10^9/L; red blood
cells 4.8 x 10^12/L.; The parasitaemia is 2.5 %.; There are ≥ 20 % blasts in the bone marrow.; A diameter of 7 to 8 µm (μm) is
normal for a red cell; 12–15 µm for a neutrophil.; Temperature 37 °C ± 0.5.; The red cells are normocytic and normochromic.;
Auer rods, Döhle bodies, Howell-Jolly bodies, basophilic stippling and toxic granulation are absent.; Rouleaux formation and
agglutination were not seen.; The nucleus is displaced to one side by a vacuole.; one; two; three; four; five; six; seven; eight;
nine; ten; eleven; twelve; thirteen; fourteen; fifteen; sixteen; seventeen; eighteen; nineteen; twenty; none; The image shows
overlapping cells at the edge of the smear, slightly out of focus.; The stain is pale; the stain is dark.; Cells per field: 12.
"""


def _entries(text: str) -> list[str]:
    return [entry for entry in (" ".join(part.split()) for part in text.split(";")) if entry]


def sentences() -> list[str]:
    """All sentences, sorted and without repeats, so that training sees the same text every time."""
    cells, diseases = _entries(CELLS), _entries(DISEASES)
    pairs = [(name, value) for name, values in ATTRIBUTES.items() for value in _entries(values)]
    found = set(_entries(FIXED_QUESTIONS)) | set(_entries(GENERAL))
    found |= {f"This image is for the detection of {name} cells" for name in cells + diseases}
    for template, (attribute, value) in product(_entries(QUESTIONS) + _entries(ANSWERS), pairs):
        found.add(template.format(a=attribute, v=value, V=value.capitalize()))
    for template, cell, (attribute, value) in product(_entries(CAPTIONS), cells, pairs[::5]):
        found.add(template.format(c=cell, C=cell.capitalize(), a=attribute, v=value))
    found |= set(cells) | {name.capitalize() for name in cells} | set(diseases) | {str(n) for n in range(200)}
    return sorted(found)
