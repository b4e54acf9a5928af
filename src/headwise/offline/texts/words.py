"""Names, places, things: words of our own, none of them in the word lists of evaluations (a test compares)."""

from random import Random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST = _words(
    """
    Amara Anneli Bogdan Carlotta Cosmin Dagny Darius Delphine Eirik Elif Emeka Esperanza Farida Fintan Gudrun
    Hamza Henrike Ignacio Ilinca Imogen Jarek Jovana Kaito Kavita Leocadia Lorcan Ludmila Maelle Malik Mirela
    Nadia Noor Octavio Oksana Olufemi Paloma Priya Quentin Rafael Ragnhild Rosalind Sefa Silvana Soren Tamsin
    Teodor Ulrike Valentina Wanjiru Xiomara Yasmin Yusuf Zbigniew Zelda
    """
)
LAST = _words(
    """
    Abernathy Adeyemi Albescu Bartosz Bianchi Bjornstad Carvalho Castellan Demirci Dvorak Eriksen Etxeberria
    Farrugia Fontaine Gallagher Georgiou Haddad Hakkinen Ibarra Jankowski Johansson Kaplan Karimov Kowalczyk
    Lindqvist Lombardi Mbeki Mendoza Nakamura Novotny Obradovic Okonkwo Pereira Petrenko Quintana Rasmussen
    Rossetti Sandoval Stavros Szabo Takahashi Tedesco Uzun Vasquez Virtanen Wagenaar Whitlock Yamada Zawadzki
    Zimmermann
    """
)
TOWNS = _words(
    """
    Aarhus Bergamo Brno Cadiz Coimbra Debrecen Dundee Esbjerg Galway Ghent Girona Graz Haarlem Iasi Izmir Jena
    Kaunas Kosice Lahti Leiden Liepaja Ljubljana Malaga Maribor Nantes Novara Odense Oulu Padua Pecs Poznan
    Quimper Rijeka Rostock Salerno Sibiu Split Tampere Tartu Toledo Trieste Turku Ulm Utrecht Varna Vigo Wroclaw
    Zadar
    """
)
PRODUCTS = tuple(
    word.replace("-", " ")
    for word in _words(
        """
    thermostat dishwasher projector trolley dehumidifier scanner trackball router charger headset tripod
    microphone treadmill espresso-maker air-purifier rice-cooker label-printer bike-trailer desk-lamp soundbar
    webcam power-bank lawnmower hedge-trimmer pressure-cooker sewing-machine camping-stove baby-monitor
    smoke-alarm wall-bracket water-softener leaf-blower tile-cutter paint-sprayer cordless-drill
    """
    )
)
GOODS = _words(
    """
    turnips apricots lentils cinnamon radishes cranberries oatmeal marzipan walnuts parsnips saffron horseradish
    chickpeas raisins gherkins paprika buckwheat asparagus molasses rhubarb cardamom semolina pistachios
    shallots tarragon
    """
)
TEAMS = _words("billing logistics payroll research procurement compliance translation dispatch archive maintenance")
TRADES = _words(
    """
    bookbinder glazier beekeeper cartographer upholsterer locksmith veterinarian stonemason librarian surveyor
    optician brewer choreographer luthier thatcher
    """
)
STATES = ("pending", "shipped", "cancelled", "refunded", "delivered")
MONTHS = _words(
    """
    January February March April May June July August September October November December
    """
)
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")


def person(rng: Random) -> str:
    """Return a first and a last name."""
    return f"{rng.choice(FIRST)} {rng.choice(LAST)}"


def code(rng: Random) -> str:
    """Return letters and digits, such as KX-4821."""
    letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(2))
    return f"{letters}-{rng.randrange(1000, 10000)}"


def serial(rng: Random) -> str:
    """Return the beginning of a UUID, such as 7f3a90c1-44be-9d02."""
    return f"{rng.randrange(16**8):08x}-{rng.randrange(16**4):04x}-{rng.randrange(16**4):04x}"


def date(rng: Random) -> str:
    """Return a date, such as 2021-07-14."""
    return f"{rng.randrange(1998, 2025)}-{rng.randrange(1, 13):02d}-{rng.randrange(1, 29):02d}"


def money(rng: Random) -> str:
    """Return an amount, such as 184.50."""
    return f"{rng.randrange(3, 900)}.{rng.choice(('00', '50', '90', '95', '25'))}"
