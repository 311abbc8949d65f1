"""The names and nouns of facts; data.facts divides every pool but the months between the splits."""

FIRST_NAMES = """
    Maria Tomas Ingrid Kofi Leila Pavel Aiko Bruno Chiara Dmitri Elena Farid Greta Hassan Irene Jonas
    Katya Luca Mina Nadia Oscar Priya Quentin Rosa Stefan Tara Umar Vera Walter Ximena Yusuf Zoe Anders
    Beatriz Cedric Daphne Emil Fatima Gustav Hana
""".split()
LAST_NAMES = """
    Keller Okafor Lindqvist Moreau Tanaka Alvarez Novak Petrov Haddad Silva Brandt Costa Dahl Eriksen
    Fontaine Garcia Horvat Ivanova Jansen Kaya Larsen Mbeki Nakamura Ortega Popescu Quispe Rossi Sato
    Toivonen Ueda Vargas Weber Xu Yilmaz Zhang Abbott Bishop Carver Dalton Ellis
""".split()
PLACES = """
    Lisbon Tromso Kyoto Nairobi Quito Geneva Oslo Havana Porto Dublin Krakow Lagos Manila Bergen Cusco
    Dakar Florence Granada Helsinki Istanbul Jakarta Kampala Lyon Malmo Naples Odessa Perth Riga Seville
    Tallinn Utrecht Valencia Warsaw Zagreb Antwerp Bilbao Calgary Dresden Exeter Ghent
""".split()
FACILITIES = """
    archive warehouse laboratory library museum observatory workshop harbour theatre clinic bakery foundry
    greenhouse courthouse brewery printworks aquarium depot shipyard academy gallery cinema chapel
    windmill airfield
""".split()
WORDS = """
    lantern orchid falcon marble compass saffron glacier violin thistle anchor ember walnut canyon pepper
    juniper beacon meadow copper raven tulip harvest cobalt willow magnet island ginger tunnel feather
    basil comet pillow garnet otter maple quartz ribbon sparrow timber velvet window
""".split()
ADJECTIVES = """
    silent golden crooked northern hollow amber distant gentle frozen scarlet narrow ancient bright rusty
    humble
""".split()
COLOURS = """
    red green blue yellow purple orange silver brown white black pink grey
""".split()
OBJECTS = """
    umbrella bicycle teapot suitcase hat clock ladder lamp scarf guitar kettle vase drum basket chair
    mirror
""".split()
MONTHS = """
    January February March April May June July August September October November December
""".split()
